"""The one place that knows how collectives are called in which version of torch."""

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
]

_SLICE = timedelta(seconds=0.5)


Group: TypeAlias = "dist.ProcessGroup | BareGroup"
"""A process group of the user's, or a bare Gloo group of an exchange (see ``gloo.py``)."""


class BareGroup(Protocol):
    """The methods of ``torch.distributed.ProcessGroupGloo`` that are used here."""

    def rank(self) -> int:
        """This rank."""
        ...

    def size(self) -> int:
        """The number of ranks."""
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
        tensor: This rank's.
        group: The group.
        op: How to reduce.

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
        value: ``[n]``, this rank's.
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


def all_to_all_flat(out: Tensor, value: Tensor, group: Group) -> dist.Work | None:
    """Start sending every rank its part of a flat tensor.

    Args:
        out: ``[world_size * n]``, one part from every rank.
        value: ``[world_size * n]``, one part for every rank.
        group: The group.

    Returns:
        The work to wait for.
    """
    work: dist.Work | None
    if isinstance(group, dist.ProcessGroup):
        work = dist.all_to_all_single(out, value, group=group, async_op=True)
    else:
        work = group.alltoall_base(out, value, [], [])
    return work


def gather_to_first(value: Tensor, out: list[Tensor] | None, group: Group) -> dist.Work | None:
    """Start gathering equal tensors of all ranks on the group's rank 0.

    Args:
        value: This rank's tensor.
        out: One tensor a rank on rank 0 of the group, None elsewhere.
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
        tensor: What is sent, and received elsewhere.
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


def abandon(*groups: object) -> None:
    """Leave groups alone for good: a collective under way in them may never end.

    A Gloo group that is destroyed waits for its collectives, up to the group's time-out, also when
    that happens at the end of the process. One that is never destroyed does not.

    Args:
        *groups: The groups, or whatever keeps them alive.
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

    def has(self, key: str) -> bool:
        """Whether a value is set; never waits for one."""
        found: bool = self._store().check([key])
        return found

    def get(self, key: str) -> bytes | None:
        """A value, or None; never waits for one to be set."""
        store = self._store()
        if not store.check([key]):
            return None
        value: bytes = store.get(key)
        return value

    def set(self, key: str, value: bytes | str) -> None:
        """Set a value for all ranks to see."""
        self._store().set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a number that all ranks see, and return the sum."""
        total: int = self._store().add(key, amount)
        return total

    def _store(self) -> Any:
        world = torch.distributed.distributed_c10d
        return world.PrefixStore(self._prefix, world._get_default_store())
