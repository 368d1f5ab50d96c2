"""The plain all-reduce, for warm-up, for ``enabled=False`` and for what cannot be compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

__all__ = ["all_reduce_mean", "average"]


def all_reduce_mean(
    buffer: Tensor, group: dist.ProcessGroup, also: Sequence[Tensor] = ()
) -> Future[Tensor]:
    """Average a bucket over the ranks, uncompressed, in place.

    Args:
        buffer: ``[numel]``, or a sparse tensor.
        group: DDP's process group.
        also: Further tensors to average in place before the future completes.

    Returns:
        A future of the same tensor.
    """
    futures = []
    for tensor in (buffer, *also):
        tensor.div_(group.size())
        work = dist.all_reduce(tensor, group=group, async_op=True)
        assert work is not None
        futures.append(work.get_future())

    def own_buffer(done: Future[list[Future[Tensor]]]) -> Tensor:
        for each in done.value():
            each.value()  # raises what the collective raised
        return buffer

    future: Future[Tensor] = torch.futures.collect_all(futures).then(own_buffer)
    return future


def average(buffer: Tensor, group: dist.ProcessGroup) -> None:
    """Average a bucket over the ranks, uncompressed, in place, and wait for it.

    Args:
        buffer: ``[numel]``.
        group: A process group that nothing else uses at the time.
    """
    buffer.div_(group.size())
    dist.all_reduce(buffer, group=group)
