"""The topologies: the servers of a bucket, their shares and the stages. The only registry of them."""

from __future__ import annotations

import torch.distributed as dist

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.topology.hierarchical import Hierarchical
from effadam_hook.exchange.topology.leg import Leg, Load
from effadam_hook.exchange.topology.node_table import NodeTable
from effadam_hook.exchange.topology.rank0 import Rank0
from effadam_hook.exchange.topology.rule import Choice, choose_topology, describe_obstacle
from effadam_hook.exchange.topology.sharded import Sharded
from effadam_hook.exchange.topology.topology import Stage, Topology

__all__ = [
    "AUTO",
    "FLAT_TOPOLOGIES",
    "HIERARCHICAL",
    "TOPOLOGIES",
    "Choice",
    "Leg",
    "Load",
    "NodeTable",
    "Stage",
    "Topology",
    "choose_topology",
    "describe_obstacle",
    "make_topology",
]

FLAT_TOPOLOGIES: dict[str, type[Topology]] = {kind.name: kind for kind in (Rank0, Sharded)}
"""The topologies that know ranks and no nodes, by public name."""

HIERARCHICAL = Hierarchical.name
"""The public name of the topology that needs a table of the nodes."""

TOPOLOGIES: dict[str, type[Topology]] = {**FLAT_TOPOLOGIES, HIERARCHICAL: Hierarchical}
"""Every topology, by its public name."""

AUTO = "auto"
"""The name that leaves the choice to :mod:`effadam_hook.exchange.topology.rule`."""


def make_topology(name: str, group: dist.ProcessGroup, table: NodeTable | None = None) -> Topology:
    """Make this rank's view of a topology.

    Args:
        name: One of :data:`TOPOLOGIES`.
        group: The process group.
        table: The nodes of the group, for the hierarchical topology. Where every node has one rank, the
            topology is "sharded", which is the same exchange.

    Returns:
        The view.

    Raises:
        EffAdamError: If the topology needs the nodes and they are not known.
    """
    if name != HIERARCHICAL:
        return FLAT_TOPOLOGIES[name](group.rank(), group.size())
    if table is None:
        raise EffAdamError(
            f"The nodes of topology={name!r} are not known before the ranks have compared options. Use "
            "attach(ddp_model, ...), or state.bind(...), before this call."
        )
    if table.ranks_per_node == 1:
        return Sharded(group.rank(), group.size())
    return Hierarchical(group.rank(), group.size(), table)
