"""Staging: the memory from which collectives send, where it is not that of the kernels.

Gloo sends from host memory. For buckets on a GPU the kernels run on the GPU, and only payloads pass
through pinned buffers, on one side stream for each stage::

    worker thread    stage begins      kernel      send                   collective    next stage
    host memory          │               │           │  ┌─► pinned ─────────► Gloo ──────► pinned
    side stream      wait for bucket ─► kernel ─► copy ─┘ event                            │
    device memory                        │                                     copy ◄──────┘ ─► kernel

The worker thread alone waits for the copy of a payload, before it starts the collective. Nothing else
waits: a payload that has arrived is copied and decoded in the order of a stream, and the bucket's
future orders the stream of backward after it. A pinned buffer that the device still reads is not
received into again: the next step's payload is sent first, and that follows from this step's result.

:class:`Staging` is for tensors on the CPU and for NCCL, where collectives use the kernels' buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.streams import Event, Streams

__all__ = ["PinnedStaging", "Staging"]


class Staging:
    """No staging: a buffer of the collectives is that of the kernels.

    Args:
        sends_from_host: Whether the host can read and write the buffers of the collectives.
        computes_on_host: Whether the host can read the buckets without waiting for a device.
    """

    def __init__(self, sends_from_host: bool = True, computes_on_host: bool = True) -> None:
        self.sends_from_host = sends_from_host
        self.computes_on_host = computes_on_host

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer of the collectives.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            device: Device of the kernels.
        """
        return torch.zeros(tuple(shape), dtype=dtype, device=device)

    def adopt(self, buffer: Tensor) -> Tensor:
        """Return a buffer of the collectives that a topology has made from another one."""
        return buffer

    def twin(self, buffer: Tensor) -> Tensor:
        """Return the buffer of the kernels that belongs to one of the collectives."""
        return buffer

    def mark(self) -> Event | None:
        """Return the point of this thread's stream at which a bucket is filled."""
        return None

    def stage(self, number: int, job: BucketJob) -> AbstractContextManager[object]:
        """Run the arithmetic of a stage within a context, in its worker thread.

        Args:
            number: Index of the stage.
            job: The bucket.
        """
        return contextlib.nullcontext()

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy what a kernel has written to the collectives, and wait for it.

        Args:
            source: A buffer of the kernels.
            target: A buffer of the collectives.

        Raises:
            EffAdamError: If the device has failed.
        """

    def receive(self, source: Tensor, target: Tensor) -> None:
        """Copy what a collective has received to the kernels that follow.

        Args:
            source: A buffer of the collectives.
            target: A buffer of the kernels.
        """

    def read(self, source: Tensor, target: Tensor) -> None:
        """Copy an element to the host, which may read it after the next :meth:`send` of the bucket.

        Args:
            source: One element.
            target: ``[1]``, a buffer of the collectives.
        """
        target.copy_(source)

    def settle(self) -> None:
        """Order this thread's stream after the work of all stages."""

    @contextlib.contextmanager
    def on_host(self, bucket: Tensor) -> Iterator[Tensor]:
        """Hand out a bucket for a dense collective within a context.

        Args:
            bucket: ``[numel]``; contains the result after the context.
        """
        yield bucket


class PinnedStaging(Staging):
    """Staging through pinned host memory.

    Args:
        streams: The streams of the device.
        stages: Number of stages, each with a stream of its own.
    """

    def __init__(self, streams: Streams, stages: int) -> None:
        super().__init__(sends_from_host=True, computes_on_host=False)
        self._streams = streams
        self._of_stages = [streams.new_stream() for _ in range(stages)]

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate pinned memory, see :class:`Staging`."""
        return self._streams.pinned(shape, dtype)

    def adopt(self, buffer: Tensor) -> Tensor:
        """Return a pinned buffer of the same shape, see :class:`Staging`."""
        return self._streams.pinned(buffer.shape, buffer.dtype)

    def twin(self, buffer: Tensor) -> Tensor:
        """Allocate a buffer on the device, see :class:`Staging`."""
        return self._streams.zeros_like(buffer)

    def mark(self) -> Event | None:
        """Record an event on this thread's stream, see :class:`Staging`."""
        return self._record()

    @contextlib.contextmanager
    def stage(self, number: int, job: BucketJob) -> Iterator[None]:
        """Issue the work of a stage to its stream, after the bucket has been filled."""
        stream = self._of_stages[number]
        with self._streams.on(stream):
            stream.wait_event(job.ready)
            # Should the exchange stop, DDP frees the bucket while this stream may still read it.
            self._streams.keep(job.bucket, stream)
            yield

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy to pinned memory and wait for it, see :class:`Staging`."""
        try:
            self._streams.copy(source, target)
            self._record().synchronize()
        except RuntimeError as error:  # as an error of this package it is the cause on all ranks
            raise EffAdamError(
                f"The device has failed before a payload reached the host: {error}. The cause may be "
                "any earlier operation on it: CUDA_LAUNCH_BLOCKING=1 shows which one."
            ) from error

    def receive(self, source: Tensor, target: Tensor) -> None:
        """Copy to the device in the order of the stream, see :class:`Staging`."""
        self._streams.copy(source, target)

    def read(self, source: Tensor, target: Tensor) -> None:
        """Copy in the order of this thread's stream, see :class:`Staging`."""
        self._streams.copy(source, target)

    def settle(self) -> None:
        """Order this thread's stream, see :class:`Staging`."""
        for stream in self._of_stages:
            self._streams.current_stream().wait_stream(stream)

    @contextlib.contextmanager
    def on_host(self, bucket: Tensor) -> Iterator[Tensor]:
        """Copy a bucket to pinned memory and its result back, see :class:`Staging`."""
        staged = self._streams.pinned(bucket.shape, bucket.dtype)
        self.send(bucket, staged)
        yield staged
        self.receive(staged, bucket)

    def _record(self) -> Event:
        event = self._streams.new_event()
        event.record(self._streams.current_stream())
        return event
