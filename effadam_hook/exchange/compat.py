"""The one place that knows how collectives are called in which version of torch."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "DefaultStore",
    "abandon",
    "all_gather_flat",
    "backend_of",
    "device_of",
    "gather_bytes",
    "gather_to_first",
    "new_group_alone",
    "new_group_like",
    "timeout_of",
    "wait_while",
]

_SLICE = timedelta(seconds=0.5)


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


def device_of(group: dist.ProcessGroup) -> torch.device:
    """A device whose tensors a group can send: the CPU where it can."""
    if any(device.type == "cpu" for device in group._device_types):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """The group's time-out for collectives on a device, or None if its backend tells none."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None


def new_group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A further Gloo group of the same ranks and time-out; every rank of the group must call this.

    It lives until ``destroy_process_group()``: torch gives a group that is made after one was
    destroyed its name again, and with it what the store still holds of the old one's addresses.
    """
    ranks = dist.get_process_group_ranks(group)
    made: dist.ProcessGroup = dist.new_group(
        ranks,
        timeout=timeout_of(group, torch.device("cpu")),
        backend="gloo",
        use_local_synchronization=True,
    )
    return made


def new_group_alone() -> dist.ProcessGroup:
    """A group of this rank and nobody else; the other ranks need not do anything."""
    made: dist.ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return made


def wait_while(work: dist.Work, is_useful: Callable[[], bool]) -> bool:
    """Wait for a collective on Gloo, and look up now and then whether there is any use in it.

    A thread that is blocked in torch when the interpreter shuts down aborts the process; one that
    waits a moment at a time can be asked to end.

    Args:
        work: What :func:`torch.distributed.all_reduce` and the like return.
        is_useful: Asked twice a second.

    Returns:
        Whether the collective is done; False if waiting was given up.

    Raises:
        RuntimeError: If the collective has failed.
    """
    while not _done_within(work, _SLICE):
        if work.is_completed():
            work.wait()  # raises if it was the collective that failed, not the slice
            return True
        if not is_useful():
            return False
    return True


def _done_within(work: dist.Work, slice_: timedelta) -> bool:
    try:
        work.wait(slice_)
    except RuntimeError:
        return False
    return True


def abandon(*groups: dist.ProcessGroup) -> None:
    """Leave groups alone for good: a collective under way in them may never end.

    A Gloo group that is destroyed waits for its collectives, up to the group's time-out, also when
    that happens at the end of the process. One that is never destroyed does not.

    Args:
        *groups: The process groups.
    """
    for group in groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class DefaultStore:
    """The store through which the default process group was set up, as long as that group lives.

    It holds no reference: a store that is kept alive keeps its port from the next process group.

    Args:
        prefix: Put before every key.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._world = weakref.ref(dist.group.WORLD) if dist.is_initialized() else lambda: None

    def is_reachable(self) -> bool:
        """Whether that process group is still the default one."""
        return dist.is_initialized() and dist.group.WORLD is self._world()

    def get(self, key: str) -> bytes | None:
        """A value, or None; never waits for one to be set."""
        store = self._store()
        if not store.check([key]):
            return None
        value: bytes = store.get(key)
        return value

    def set(self, key: str, value: bytes) -> None:
        """Set a value for all ranks to see."""
        self._store().set(key, value.decode())

    def _store(self) -> Any:
        world = torch.distributed.distributed_c10d
        return world.PrefixStore(self._prefix, world._get_default_store())
