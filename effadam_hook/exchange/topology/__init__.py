"""The topologies: the servers of a bucket, their shares and the stages. The only registry of them."""

from __future__ import annotations

import torch.distributed as dist

from effadam_hook.exchange.topology.leg import Leg
from effadam_hook.exchange.topology.rank0 import Rank0
from effadam_hook.exchange.topology.sharded import Sharded
from effadam_hook.exchange.topology.topology import Stage, Topology

__all__ = ["AUTO", "TOPOLOGIES", "Leg", "Stage", "Topology", "make_topology"]

TOPOLOGIES: dict[str, type[Topology]] = {kind.name: kind for kind in (Rank0, Sharded)}
"""Every topology, by its public name."""

AUTO = "auto"
"""The name that leaves the choice to the ranks, see :mod:`effadam_hook.exchange.auto`."""


def make_topology(name: str, group: dist.ProcessGroup) -> Topology:
    """Make this rank's view of a topology.

    Args:
        name: One of :data:`TOPOLOGIES`.
        group: The process group.

    Returns:
        The view.
    """
    return TOPOLOGIES[name](group.rank(), group.size())
