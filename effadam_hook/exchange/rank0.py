"""Topology "rank0": the group's rank 0 is the server of everything.

The parameter server of the paper. Payloads are gathered on rank 0, which reduces them, quantizes the
mean and broadcasts it. Rank 0 pays for it: it takes in N payloads and sends out N.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.compat import Group, broadcast_from_first, gather_to_first

__all__ = ["Rank0"]


class Rank0:
    """One server, on rank 0 of the group.

    Args:
        rank: This process's rank in the group.
        world_size: The group's size.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.name = "rank0"
        self.servers = 1
        self.serves: int | None = 0 if rank == 0 else None
        self.way = ""

    def settle(self, group: Group) -> None:
        """Nothing to find out."""

    def outgoing(self, downlink: Tensor) -> Tensor:
        """The server's chunk ``[1, stride_bytes]`` before it is sent: the payload itself."""
        return downlink

    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink, see :class:`~effadam_hook.exchange.topology.Topology`."""
        out = list(received.unbind(0)) if self.serves is not None else None
        return gather_to_first(payload[0], out, group)

    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink, see :class:`~effadam_hook.exchange.topology.Topology`."""
        return broadcast_from_first(payload, group)
