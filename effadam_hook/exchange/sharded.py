"""Topology "sharded": every rank is the server of its share of every parameter.

Chunks go to their servers by an all-to-all, each server reduces and quantizes its own, and sends the
result to everyone. Blocks and the order of summation are those of "rank0", so the results are too;
only the traffic differs, and no rank carries more than any other.

The results go by an all-to-all too, of as many copies as there are ranks: Gloo gathers around a ring,
one rank after the other, and waits N - 1 times for as long as a message is under way. That is the
same number of bytes on every link. NCCL knows better ways and gathers.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.compat import all_gather_flat

__all__ = ["Sharded"]


class Sharded:
    """As many servers as ranks.

    Args:
        rank: This process's rank in the group.
        world_size: The group's size.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.name = "sharded"
        self.servers = world_size
        self.serves: int | None = rank

    def outgoing(self, downlink: Tensor) -> Tensor:
        """A copy of the server's chunk for every rank, or one for NCCL: tensors of their own."""
        return downlink.new_zeros(1 if downlink.is_cuda else self.servers, downlink.shape[1])

    def send_up(
        self, payload: Tensor, received: Tensor, group: dist.ProcessGroup
    ) -> dist.Work | None:
        """Start the uplink, see :class:`~effadam_hook.exchange.topology.Topology`."""
        work: dist.Work | None = dist.all_to_all_single(
            received.view(-1), payload.view(-1), group=group, async_op=True
        )
        return work

    def send_down(
        self, outgoing: Tensor, payload: Tensor, group: dist.ProcessGroup
    ) -> dist.Work | None:
        """Start the downlink, see :class:`~effadam_hook.exchange.topology.Topology`."""
        if len(outgoing) == 1:
            return all_gather_flat(payload.view(-1), outgoing[0], group)
        outgoing[1:] = outgoing[0]
        return self.send_up(outgoing, payload, group)
