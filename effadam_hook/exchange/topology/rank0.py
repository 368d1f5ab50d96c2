"""Topology "rank0": rank 0 of the group serves the whole bucket.

This is the parameter server of the paper. Payloads are gathered on rank 0, which reduces them,
quantizes the mean and broadcasts it. The link of rank 0 carries N - 1 payloads in each direction.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.collectives import Group, broadcast_from_first, gather_to_first
from effadam_hook.exchange.topology.leg import Leg, Load
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
    def legs(cls, load: Load) -> list[Leg]:
        """Describe the gather to rank 0 and the broadcast from it; see :class:`Topology`."""
        n, ranks, payload = load.world_size, load.ranks_per_node, load.payload_bytes
        rounds = (n - 1).bit_length()
        out, inside = (min(1, n - ranks), min(1, ranks - 1)) if load.on_nccl else _sends(n, ranks)
        return [
            Leg("up/rank0", 0, payload * (n - ranks), 1, n - 2, payload * (ranks - 1)),
            Leg("down/rank0", payload * out, 0, rounds, 0, payload * inside),
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


def _sends(world_size: int, ranks_per_node: int) -> tuple[int, int]:
    """Count the sends of Gloo's broadcast: in round b, ranks below 2^b send to those 2^b above.

    Returns:
        The number of sends from the first node to other nodes, and from rank 0 inside its node.
    """
    sends = [
        (rank, rank + (1 << bit))
        for bit in range((world_size - 1).bit_length())
        for rank in range(min(1 << bit, ranks_per_node))
        if rank + (1 << bit) < world_size
    ]
    leaving = sum(to >= ranks_per_node for _, to in sends)
    return leaving, sum(rank == 0 and to < ranks_per_node for rank, to in sends)
