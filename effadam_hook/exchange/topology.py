"""Who serves what: the part of an exchange that differs between "rank0" and "sharded"."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.compat import Group
from effadam_hook.exchange.rank0 import Rank0
from effadam_hook.exchange.sharded import Sharded

__all__ = ["KINDS", "Topology", "make_topology"]

KINDS: dict[str, type[Rank0] | type[Sharded]] = {"rank0": Rank0, "sharded": Sharded}
"""The topologies by name."""


def make_topology(name: str, group: dist.ProcessGroup) -> Topology:
    """The topology of that name for a process group."""
    return KINDS[name](group.rank(), group.size())


class Topology(Protocol):
    """One rank's view of the servers, and the two collectives that reach them."""

    name: str
    """The public name."""
    servers: int
    """How many servers there are, and so how many chunks a payload has."""
    serves: int | None
    """Which chunk this rank is the server of, if any."""
    way: str
    """Which way messages take, and why, where there is a choice."""

    def settle(self, group: Group) -> None:
        """Choose the way that messages take on Gloo; a collective operation.

        Args:
            group: The process group, or one of the same ranks. Buffers are to be made afterwards.
        """
        ...

    def outgoing(self, downlink: Tensor) -> Tensor:
        """A buffer ``[copies, stride_bytes]`` for what this rank sends as a server.

        Args:
            downlink: ``[servers, stride_bytes]``, the buffer of the downlink's payload.
        """
        ...

    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink.

        Args:
            payload: ``[servers, stride_bytes]``, this worker's chunk for every server.
            received: ``[world_size, stride_bytes]``, filled with every worker's chunk for this
                server; empty where this rank is none.
            group: The process group.

        Returns:
            The work to wait for.
        """
        ...

    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink.

        Args:
            outgoing: What :meth:`outgoing` returned, with the first row filled.
            payload: ``[servers, stride_bytes]``, filled with every server's chunk.
            group: The process group.

        Returns:
            The work to wait for.
        """
        ...
