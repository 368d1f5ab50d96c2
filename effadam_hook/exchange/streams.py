"""Streams, events and pinned memory of a device, as far as exchanges use them.

:class:`CudaStreams` passes the calls to torch. The tests drive the exchanges on the CPU with a
stand-in, which delays copies and finds accesses that no wait orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.futures import Future

__all__ = ["CudaStreams", "Event", "Stream", "Streams", "new_future", "streams_of"]


class Event(Protocol):
    """A point in the order of a stream, see :class:`torch.cuda.Event`."""

    def record(self, stream: Any) -> None:
        """Set the point to the end of the stream's current work."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until the device has reached the point."""
        ...


class Stream(Protocol):
    """Work of a device in order, see :class:`torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None:
        """Order what follows on this stream after the current work of another stream."""
        ...

    def wait_event(self, event: Any) -> None:
        """Order what follows on this stream after an event."""
        ...


class Streams(Protocol):
    """The streams of one device."""

    def new_stream(self) -> Stream:
        """Make a stream."""
        ...

    def current_stream(self) -> Stream:
        """Return the stream to which this thread issues work."""
        ...

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Issue work of this thread to a stream within a context."""
        ...

    def new_event(self) -> Event:
        """Make an event."""
        ...

    def new_future(self) -> Future[Tensor]:
        """Make a future that orders the stream of whoever waits after the completing stream."""
        ...

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        """Keep the allocator from reusing a tensor's memory before the current work of a stream."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy between device and pinned memory, in the order of the current stream."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate zeros in host memory that copies reach without waiting."""
        ...

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Allocate zeros on the device in the shape of a tensor."""
        ...


class CudaStreams:
    """Streams of a CUDA device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> Stream:
        """See :class:`Streams`."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> Stream:
        """See :class:`Streams`."""
        return torch.cuda.current_stream(self._device)

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """See :class:`Streams`."""
        return torch.cuda.stream(stream)  # type: ignore[arg-type]

    def new_event(self) -> Event:
        """See :class:`Streams`; a thread that waits for the event leaves its core to others."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def new_future(self) -> Future[Tensor]:
        """See :class:`Streams`."""
        return Future(devices=[self._device])

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        """See :class:`Streams`."""
        tensor.record_stream(stream)  # type: ignore[arg-type]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See :class:`Streams`."""
        target.copy_(source, non_blocking=True)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See :class:`Streams`."""
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """See :class:`Streams`."""
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device)


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a device; None for the CPU, which works when it is called.

    Args:
        device: The device, with its index.
    """
    return CudaStreams(device) if device.type == "cuda" else None


def new_future(device: torch.device) -> Future[Tensor]:
    """Make a future of a tensor on a device.

    A future that is made without its device refuses tensors on a GPU, and orders no stream.

    Args:
        device: The device, with its index.
    """
    streams = streams_of(device)
    return Future() if streams is None else streams.new_future()
