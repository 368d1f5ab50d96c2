"""Calls of collectives, for every supported version of torch and both kinds of group."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "BareGroup",
    "DefaultStore",
    "Group",
    "abandon",
    "all_gather_flat",
    "all_reduce",
    "all_to_all_flat",
    "backend_of",
    "broadcast_from_first",
    "device_of",
    "gather_to_first",
    "new_group_alone",
    "timeout_of",
    "wait_while",
    "wire_device",
]

_SLICE = timedelta(seconds=0.5)


Group: TypeAlias = "dist.ProcessGroup | BareGroup"
"""A process group of the user's, or a bare Gloo group of an exchange (see ``groups.py``)."""


class BareGroup(Protocol):
    """The methods of ``torch.distributed.ProcessGroupGloo`` that this package uses."""

    def rank(self) -> int:
        """Return this rank."""
        ...

    def size(self) -> int:
        """Return the number of ranks."""
        ...

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Start reducing tensors in place."""
        ...

    def _allgather_base(self, out: Tensor, value: Tensor) -> dist.Work: ...

    def alltoall_base(
        self, out: Tensor, value: Tensor, sizes_out: list[int], sizes: list[int]
    ) -> dist.Work:
        """Start exchanging the parts of flat tensors."""
        ...

    def gather(self, out: list[list[Tensor]], values: list[Tensor], options: Any) -> dist.Work:
        """Start gathering tensors on one rank."""
        ...

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Start sending tensors from one rank."""
        ...


def all_reduce(tensor: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> dist.Work:
    """Start reducing a tensor over all ranks, in place.

    Args:
        tensor: The tensor of this rank.
        group: The group.
        op: The reduction.

    Returns:
        The work to wait for.
    """
    work: dist.Work | None
    if isinstance(group, dist.ProcessGroup):
        work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
    else:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        work = group.allreduce([tensor], options)
    assert work is not None
    return work


def all_gather_flat(out: Tensor, value: Tensor, group: Group) -> dist.Work | None:
    """Start gathering equal tensors of all ranks, in rank order, into one flat tensor.

    Args:
        out: ``[world_size * n]``.
        value: ``[n]``, the tensor of this rank.
        group: The group.

    Returns:
        The work to wait for.
    """
    work: dist.Work | None
    if isinstance(group, dist.ProcessGroup):
        # torch 2.13 deprecates all_gather_into_tensor in favour of all_gather_single.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(out, value, group=group, async_op=True)
    else:
        work = group._allgather_base(out, value)
    return work


def all_to_all_flat(
    out: Tensor,
    value: Tensor,
    group: Group,
    sizes_out: list[int] | None = None,
    sizes: list[int] | None = None,
) -> dist.Work | None:
    """Start sending every rank its part of a flat tensor.

    Args:
        out: ``[world_size * n]``, one part from every rank.
        value: ``[world_size * n]``, one part for every rank.
        group: The group.
        sizes_out: Elements of each part of ``out``; None for equal parts.
        sizes: Elements of each part of ``value``; None for equal parts.

    Returns:
        The work to wait for.
    """
    work: dist.Work | None
    if isinstance(group, dist.ProcessGroup):
        work = dist.all_to_all_single(out, value, sizes_out, sizes, group=group, async_op=True)
    else:
        work = group.alltoall_base(out, value, sizes_out or [], sizes or [])
    return work


def gather_to_first(value: Tensor, out: list[Tensor] | None, group: Group) -> dist.Work | None:
    """Start gathering equal tensors of all ranks on the group's rank 0.

    Args:
        value: The tensor of this rank.
        out: One tensor for each rank on rank 0 of the group, None elsewhere.
        group: The group.

    Returns:
        The work to wait for.
    """
    work: dist.Work | None
    if isinstance(group, dist.ProcessGroup):
        first = dist.get_global_rank(group, 0)
        work = dist.gather(value, out, dst=first, group=group, async_op=True)
    else:
        options = dist.GatherOptions()
        options.rootRank = 0
        work = group.gather([] if out is None else [out], [value], options)
    return work


def broadcast_from_first(tensor: Tensor, group: Group) -> dist.Work | None:
    """Start sending a tensor from the group's rank 0 to all ranks.

    Args:
        tensor: Sent on rank 0 of the group, received on the others.
        group: The group.

    Returns:
        The work to wait for.
    """
    work: dist.Work | None
    if isinstance(group, dist.ProcessGroup):
        first = dist.get_global_rank(group, 0)
        work = dist.broadcast(tensor, src=first, group=group, async_op=True)
    else:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        work = group.broadcast([tensor], options)
    return work


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the name of the backend that a group uses for tensors on a device, in lower case."""
    name: str = group._get_backend(device).name()
    return name.lower()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return a device whose tensors a group can send: the CPU if possible."""
    if any(device.type == "cpu" for device in group._device_types):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def wire_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the device whose tensors carry the data of a device over a group.

    Args:
        group: The group.
        device: Device of the data.

    Returns:
        The CPU if a group sends the device's tensors by Gloo, which sends from host memory; the
        device itself otherwise.
    """
    has_cpu = any(each.type == "cpu" for each in group._device_types)
    return torch.device("cpu") if has_cpu and backend_of(group, device) == "gloo" else device


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return the time-out of a group's collectives on a device; None if the backend has none."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None


def new_group_alone() -> dist.ProcessGroup:
    """Make a group of this rank alone; the other ranks take no part."""
    made: dist.ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return made


def wait_while(work: dist.Work, is_useful: Callable[[], bool]) -> bool:
    """Wait for a collective on Gloo, in slices, as long as waiting is useful.

    A thread that is blocked in torch when the interpreter shuts down aborts the process. A thread
    that waits in slices can end before.

    Args:
        work: The collective, as :func:`torch.distributed.all_reduce` and others return it.
        is_useful: Called twice a second; waiting ends when it returns False.

    Returns:
        Whether the collective is complete.

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


def abandon(*groups: object) -> None:
    """Never destroy groups, because a collective in progress in them may never end.

    The destructor of a Gloo group waits for its collectives, up to the time-out of the group, also
    at the end of the process. A group that is never destroyed does not wait.

    Args:
        *groups: The groups, or objects that keep them alive.
    """
    for group in groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class DefaultStore:
    """The store of the default process group, as long as that group lives.

    It is not referenced: a store that is kept alive keeps its port from the next process group.

    Args:
        prefix: Prefix of every key.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._world = weakref.ref(dist.group.WORLD) if dist.is_initialized() else lambda: None

    def is_reachable(self) -> bool:
        """Return whether that process group is still the default one."""
        return dist.is_initialized() and dist.group.WORLD is self._world()

    def has(self, key: str) -> bool:
        """Return whether a value is set, without waiting for it."""
        found: bool = self._store().check([key])
        return found

    def get(self, key: str) -> bytes | None:
        """Return a value, or None if it is not set, without waiting for it."""
        store = self._store()
        if not store.check([key]):
            return None
        value: bytes = store.get(key)
        return value

    def set(self, key: str, value: bytes | str) -> None:
        """Set a value that all ranks can read."""
        self._store().set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a number that all ranks share, and return the sum."""
        total: int = self._store().add(key, amount)
        return total

    def _store(self) -> Any:
        world = torch.distributed.distributed_c10d
        return world.PrefixStore(self._prefix, world._get_default_store())
