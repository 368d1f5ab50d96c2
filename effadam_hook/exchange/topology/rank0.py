"""Topology "rank0": rank 0 of the group serves the whole bucket.

This is the parameter server of the paper. Payloads are gathered on rank 0, which reduces them,
quantizes the mean and broadcasts it. The link of rank 0 carries N - 1 payloads in each direction.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.collectives import Group, broadcast_from_first, gather_to_first
from effadam_hook.exchange.topology.leg import Leg
from effadam_hook.exchange.topology.topology import Topology

__all__ = ["Rank0"]


class Rank0(Topology):
    """One server, on rank 0 of the group."""

    name = "rank0"

    @classmethod
    def servers_among(cls, world_size: int) -> int:
        """Return 1."""
        return 1

    @classmethod
    def legs(cls, payload_bytes: float, world_size: int, tree: bool) -> list[Leg]:
        """Describe the gather to rank 0 and the broadcast from it; see :class:`Topology`."""
        rounds = (world_size - 1).bit_length()
        return [
            Leg("up/rank0", 0, payload_bytes * (world_size - 1), 1, world_size - 2),
            Leg("down/rank0", payload_bytes * (1 if tree else rounds), 0, rounds),
        ]

    def outgoing(self, downlink: Tensor) -> Tensor:
        """Return the payload itself, which is the one chunk of the server."""
        return downlink

    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink, see :class:`Topology`."""
        out = list(received.unbind(0)) if self.serves is not None else None
        return gather_to_first(payload[0], out, group)

    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink, see :class:`Topology`."""
        return broadcast_from_first(payload, group)
