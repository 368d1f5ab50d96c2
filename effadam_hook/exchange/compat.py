"""The one place that knows how collectives are called in which version of torch."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_gather_flat",
    "backend_of",
    "gather_bytes",
    "gather_to_first",
    "new_group_like",
    "timeout_of",
]


def all_gather_flat(out: Tensor, value: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Start gathering equal tensors of all ranks, in rank order, into one flat tensor.

    Args:
        out: ``[world_size * n]``.
        value: ``[n]``, this rank's.
        group: The process group.

    Returns:
        The work to wait for.
    """
    # torch 2.13 deprecates all_gather_into_tensor in favour of all_gather_single.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, value, group=group, async_op=True)
    return work


def gather_to_first(
    value: Tensor, out: list[Tensor] | None, group: dist.ProcessGroup
) -> dist.Work | None:
    """Start gathering equal tensors of all ranks on the group's rank 0.

    Args:
        value: This rank's tensor.
        out: One tensor a rank on rank 0 of the group, None elsewhere.
        group: The process group.

    Returns:
        The work to wait for.
    """
    first = dist.get_global_rank(group, 0)
    work: dist.Work | None = dist.gather(value, out, dst=first, group=group, async_op=True)
    return work


def gather_bytes(
    data: bytes, group: dist.ProcessGroup, device: torch.device, everywhere: bool
) -> list[bytes]:
    """Collect a string of bytes from every rank; a collective operation.

    Args:
        data: This rank's, of any length.
        group: The process group.
        device: Where the group's backend wants tensors.
        everywhere: Whether every rank gets them all, or rank 0 of the group alone.

    Returns:
        All ranks' bytes in rank order; empty on the other ranks if not ``everywhere``.
    """
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = torch.empty(group.size(), dtype=torch.int64, device=device)
    _finish(all_gather_flat(lengths, length, group))
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    receives = everywhere or group.rank() == 0
    rows = torch.empty(group.size() if receives else 0, longest, dtype=torch.uint8, device=device)
    if everywhere:
        _finish(all_gather_flat(rows.view(-1), padded.to(device), group))
    else:
        out = list(rows.unbind(0)) if receives else None
        _finish(gather_to_first(padded.to(device), out, group))
    sizes = lengths.tolist()[: len(rows)]
    return [row[:size].numpy().tobytes() for row, size in zip(rows.cpu(), sizes, strict=True)]


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that a group uses for tensors on a device, in lower case."""
    name: str = group._get_backend(device).name()
    return name.lower()


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """The group's time-out for collectives on a device, or None if its backend tells none."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None


def new_group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A further Gloo group of the same ranks and time-out; every rank of the group must call this."""
    ranks = dist.get_process_group_ranks(group)
    made: dist.ProcessGroup = dist.new_group(
        ranks,
        timeout=timeout_of(group, torch.device("cpu")),
        backend="gloo",
        use_local_synchronization=True,
    )
    return made
