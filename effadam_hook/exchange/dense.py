"""The plain all-reduce, for warm-up, for ``enabled=False`` and for what cannot be compressed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

__all__ = ["all_reduce_mean"]


def all_reduce_mean(buffer: Tensor, group: dist.ProcessGroup) -> Future[Tensor]:
    """Average a bucket over the ranks, uncompressed, in place.

    Args:
        buffer: ``[numel]``, or a sparse tensor.
        group: DDP's process group.

    Returns:
        A future of the same tensor.
    """
    buffer.div_(group.size())
    work = dist.all_reduce(buffer, group=group, async_op=True)
    assert work is not None

    def own_buffer(done: Future[Tensor]) -> Tensor:
        done.value()  # raises what the collective raised
        return buffer

    future: Future[Tensor] = work.get_future().then(own_buffer)
    return future
