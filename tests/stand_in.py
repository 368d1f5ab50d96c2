"""A stand-in for a GPU on the CPU: an order of accesses, with late copies and late collectives.

Operators run at once, one after the other, so that results are those of a correct order. Beside them a
clock is kept for every thread and every stream. Two accesses of a buffer, one of which writes, must be
ordered by events, waits, queues or futures; otherwise a GPU may run them in the other order, and the
stand-in records a race, whatever happened this time.

Copies to the host deliver their data when an event behind them is synchronised, and collectives when
they are waited for. Until then their targets contain garbage.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["Device", "DeviceError", "LateWork"]

GARBAGE = 0xA5
Clock = dict[object, int]


class DeviceError(RuntimeError):
    """An error of the device, which CUDA reports at the next wait."""


@dataclass
class _Access:
    first: int
    last: int
    writes: bool
    actor: object
    tick: int
    what: str


@dataclass
class _Region:
    name: str
    tensor: Tensor
    on_device: bool
    accesses: list[_Access] = field(default_factory=list)
    kept: set[object] = field(default_factory=set)

    @property
    def first(self) -> int:
        return self.tensor.data_ptr()

    @property
    def last(self) -> int:
        return self.first + self.tensor.numel() * self.tensor.element_size()


class _Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def __repr__(self) -> str:
        return self.name

    def wait_stream(self, other: _Stream) -> None:
        self.device.join(self, self.device.clock_of(other))

    def wait_event(self, event: _Event) -> None:
        self.device.join(self, event.clock)

    def record_event(self) -> _Event:
        event = _Event(self.device)
        event.record(self)
        return event


class _Event:
    def __init__(self, device: Device) -> None:
        self.device, self.clock = device, Clock()

    def record(self, stream: _Stream | None = None) -> None:
        self.clock = dict(self.device.clock_of(stream or self.device.current_stream()))

    def synchronize(self) -> None:
        self.device.join(threading.get_ident(), self.clock)
        self.device.deliver(self.clock)


class _Future(Future):  # type: ignore[type-arg]
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.clocks = device, (Clock(), Clock())

    def set_result(self, result: Any) -> None:
        self.clocks = (
            dict(self.device.clock_of(self.device.current_stream())),
            dict(self.device.clock_of(threading.get_ident())),
        )
        super().set_result(result)

    def wait(self) -> Any:
        result = super().wait()
        self.device.join(self.device.current_stream(), self.clocks[0])
        self.device.join(threading.get_ident(), self.clocks[1])
        return result


class LateWork:
    """A collective that runs when it is waited for; until then its targets contain garbage.

    Args:
        device: The device.
        run: Runs the collective to its end.
        reads: Its sources.
        writes: Its targets.
        communicator: The stream on which collectives of one group run in order.
        what: Its name.
        keeps: Whether the process group keeps tensors from being freed before the collective ends, as
            that for Gloo does; that for NCCL only holds them until it is waited for.
    """

    def __init__(
        self,
        device: Device,
        run: Callable[[], object],
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        communicator: _Stream,
        what: str,
        keeps: bool,
    ) -> None:
        self.what = what
        self._device, self._run = device, run
        device.join(communicator, device.clock_of(device.current_stream()))
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                device.access(communicator, tensor, is_write, what)
                if keeps:
                    device.keep(tensor, communicator)
        self._clock = dict(device.clock_of(communicator))
        sources = {tensor.data_ptr() for tensor in reads}
        for tensor in writes:
            if tensor.data_ptr() not in sources:
                spoil(tensor)

    def is_completed(self) -> bool:
        """Return whether the host need not wait."""
        return True

    def wait(self, *_: object) -> bool:
        """Run the collective, and order the current stream after it."""
        self._device.join(self._device.current_stream(), self._clock)
        with _disable_current_modes():
            self._run()
        return True


def spoil(tensor: Tensor) -> None:
    """Overwrite a tensor with garbage."""
    with _disable_current_modes():
        tensor.detach().reshape(-1).view(torch.uint8).fill_(GARBAGE)


class Device:
    """The streams of a device that does not exist; see :class:`effadam_hook.exchange.streams.Streams`.

    Args:
        watches: Whether to find races, rather than only to delay copies.

    Attributes:
        races: The accesses that nothing orders.
        copies: Number of copies so far.
        fails_at: Number of the copy that fails, and with it all waits that follow; 0 for none.
        refuses: Whether copies to the device fail at once.
    """

    def __init__(self, watches: bool = True) -> None:
        self.watches = watches
        self.races: list[str] = []
        self.copies = 0
        self.fails_at = 0
        self.refuses = False
        self._lock = threading.RLock()
        self._clocks: dict[object, Clock] = {}
        self._regions: list[_Region] = []
        self._pending: list[tuple[object, int, Callable[[], None]]] = []
        self._local = threading.local()
        self._default = _Stream(self, "the stream of backward")
        self._made = 0

    # The interface of ``Streams``.

    def new_stream(self, name: str = "stream") -> _Stream:
        self._made += 1
        return _Stream(self, f"{name} {self._made}")

    def current_stream(self) -> _Stream:
        return getattr(self._local, "stream", self._default)

    @contextlib.contextmanager
    def on(self, stream: _Stream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            with _Watch(self) if self.watches else contextlib.nullcontext():
                yield
        finally:
            self._local.stream = before

    def new_event(self) -> _Event:
        return _Event(self)

    def new_future(self) -> Future[Tensor]:
        return _Future(self)

    def keep(self, tensor: Tensor, stream: _Stream) -> None:
        with self._lock:
            for region in self._regions_of(tensor):
                region.kept.add(stream)

    def copy(self, source: Tensor, target: Tensor) -> None:
        if self.refuses and self.holds(target):
            raise DeviceError("CUDA error: an illegal memory access was encountered")
        stream = self.current_stream()
        self.access(stream, source, False, "a copy")
        tick = self.access(stream, target, True, "a copy")
        self.copies += 1
        with _disable_current_modes():
            if any(not region.on_device for region in self._regions_of(target)):
                data = source.detach().clone()
                spoil(target)
                self._pending.append((stream, tick, lambda: target.copy_(data)))
            else:
                target.copy_(source)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.register("pinned", torch.zeros(tuple(shape), dtype=dtype), on_device=False)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        return self.register("device", torch.zeros(tensor.shape, dtype=tensor.dtype))

    # The order.

    def register(self, name: str, tensor: Tensor, on_device: bool = True) -> Tensor:
        """Watch a tensor's memory."""
        if tensor.numel():  # an empty one has no address of its own
            with self._lock:
                name = f"{name} {tuple(tensor.shape)}"
                self._regions.append(_Region(name, tensor.detach(), on_device))
        return tensor

    def kept_since_now(self) -> None:
        """Forget which streams keep tensors."""
        for region in self._regions:
            region.kept.clear()

    def free(self, tensor: Tensor, stream: _Stream | None = None) -> None:
        """Free a tensor on a stream, by default that of backward, as the caching allocator would.

        The memory is used again after the work of that stream and of the streams that keep it.
        """
        with self._lock:
            for region in self._regions_of(tensor):
                clocks = [
                    self.clock_of(stream) for stream in (stream or self._default, *region.kept)
                ]
                for access in region.accesses:
                    if all(access.tick > clock.get(access.actor, 0) for clock in clocks):
                        self.races.append(f"{region.name} is freed before {access.what}")

    def clock_of(self, actor: object) -> Clock:
        with self._lock:
            return self._clocks.setdefault(actor, {actor: 1})

    def join(self, actor: object, clock: Clock) -> None:
        """Order what an actor does next after a clock."""
        with self._lock:
            own = self.clock_of(actor)
            for other, tick in clock.items():
                own[other] = max(own.get(other, 0), tick)

    def deliver(self, clock: Clock) -> None:
        """Complete the copies that lie before a clock."""
        if 0 < self.fails_at <= self.copies:
            raise DeviceError("CUDA error: an illegal memory access was encountered")
        with self._lock:
            due = [item for item in self._pending if item[1] <= clock.get(item[0], 0)]
            self._pending = [item for item in self._pending if item not in due]
        with _disable_current_modes():
            for _, _, action in due:
                action()

    def access(self, actor: object, tensor: Tensor, writes: bool, what: str) -> int:
        """Record an access by an actor, and the races with earlier ones."""
        with self._lock:
            own = self.clock_of(actor)
            if isinstance(actor, _Stream):  # what a thread issues comes after what it knows
                self.join(actor, self.clock_of(threading.get_ident()))
            own[actor] += 1
            first = tensor.data_ptr()
            last = first + _extent(tensor)
            for region in self._regions_of(tensor):
                overlapping = [a for a in region.accesses if a.first < last and first < a.last]
                for before in overlapping:
                    if (writes or before.writes) and before.tick > own.get(before.actor, 0):
                        self.races.append(
                            f"{what} {'writes' if writes else 'reads'} {region.name} while "
                            f"{before.what} {'writes' if before.writes else 'reads'} it"
                        )
                region.accesses = [
                    a
                    for a in region.accesses
                    if not (first <= a.first and a.last <= last and (writes or a.actor is actor))
                    or (a.writes and not writes)
                ]
                region.accesses.append(_Access(first, last, writes, actor, own[actor], what))
            return own[actor]

    def see(self, tensor: Tensor, writes: bool, what: str) -> None:
        """Record an access by an operator: by the current stream, or by this thread to host memory."""
        for region in self._regions_of(tensor)[:1]:
            actor = self.current_stream() if region.on_device else threading.get_ident()
            self.access(actor, tensor, writes, what)
            if region.on_device and what == "aten::_local_scalar_dense":
                self.races.append(f"the host waits for {region.name}")

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in the memory of the device, rather than of the host."""
        return any(region.on_device for region in self._regions_of(tensor))

    def _regions_of(self, tensor: Tensor) -> list[_Region]:
        if tensor.numel() == 0:
            return []
        first = tensor.data_ptr()
        return [region for region in self._regions if region.first <= first < region.last]


class _Watch(TorchDispatchMode):
    """Reports what operators read and write."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):  # DTensors
            return func(*args, **(kwargs or {}))
        schema, kwargs = func._schema, kwargs or {}
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        if not is_view:
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                value = given.get(argument.name)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, Tensor):
                        self._device.see(tensor, writes, schema.name)
        return func(*args, **kwargs)


def _extent(tensor: Tensor) -> int:
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()
