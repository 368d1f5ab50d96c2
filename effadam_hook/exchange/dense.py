"""The dense all-reduce, for the warm-up, ``enabled=False`` and buckets that cannot be compressed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.exchange.collectives import Group, abandon, all_reduce, backend_of
from effadam_hook.exchange.streams import Stream, Streams, new_future, streams_of
from effadam_hook.exchange.watchdog.inflight import InflightBucket
from effadam_hook.exchange.watchdog.watchdog import Watchdog
from effadam_hook.exchange.worker_thread import WorkerThread

__all__ = ["DenseExchange", "start_average"]


class DenseExchange:
    """Dense averages of buckets over DDP's own process group.

    The hook itself starts the collectives, in the order in which DDP calls it. On Gloo a worker
    thread waits for them, so that the exchange can stop. Gloo itself stages buckets on a GPU: a wait
    orders the stream of the waiting thread after the result. On NCCL the hook waits at once, which
    orders a side stream, and on other backends the collectives' own futures do.

    Args:
        group: DDP's process group.
        watchdog: Records the buckets in flight.
    """

    def __init__(self, group: dist.ProcessGroup, watchdog: Watchdog) -> None:
        self._group = group
        self._watchdog = watchdog
        self._worker_thread: WorkerThread[list[dist.Work]] | None = None
        self._beside: dict[torch.device, tuple[Streams, Stream]] = {}

    def submit(self, label: str, buffer: Tensor, also: Sequence[Tensor] = ()) -> Future[Tensor]:
        """Average a bucket densely over the ranks, in place.

        Args:
            label: Name of the bucket in messages.
            buffer: ``[numel]``, or a sparse tensor.
            also: Further tensors to average in place before the future completes.

        Returns:
            A future of the same tensor.
        """
        if backend_of(self._group, buffer.device) != "gloo":
            if also:
                with self._watchdog.hold(label, "comparing what is averaged"):
                    if not self._watchdog.meet():
                        self._watchdog.check()
            beside = self._stream_beside(buffer.device)
            if beside is None:
                return _when_all_are_done(buffer, self._start(buffer, also))
            return self._issue(buffer, also, *beside)
        layout = "sparse" if buffer.is_sparse else f"{buffer.numel()} elements"
        inflight = self._watchdog.enter(
            label,
            f"a dense all-reduce with {len(also)} moments" if also else "a dense all-reduce",
            layout,
            "dense all-reduce",
            buffer,
            new_future(buffer.device),
        )
        if inflight.is_over:
            return inflight.future
        if self._worker_thread is None:
            group = self._group
            self._worker_thread = WorkerThread("effadam-dense", self._finish, self._watchdog)
            self._watchdog.on_failure(lambda: abandon(group))
            self._watchdog.on_close(self._worker_thread.close)
        try:
            if also and not self._watchdog.meet():
                return inflight.future  # which the stop completes
            works = self._start(buffer, also)
        except Exception as error:  # raised by backward, like an error of the worker thread
            self._watchdog.broke(inflight, error)
        else:
            self._worker_thread.put(inflight, works)
        return inflight.future

    def _start(self, buffer: Tensor, also: Sequence[Tensor]) -> list[dist.Work]:
        return [start_average(tensor, self._group) for tensor in (buffer, *also)]

    def _stream_beside(self, device: torch.device) -> tuple[Streams, Stream] | None:
        """Return the streams of a device, and one beside that of backward; None for the CPU."""
        if device not in self._beside:
            streams = streams_of(device)
            if streams is None:
                return None
            self._beside[device] = streams, streams.new_stream()
        return self._beside[device]

    def _issue(
        self, buffer: Tensor, also: Sequence[Tensor], streams: Streams, stream: Stream
    ) -> Future[Tensor]:
        """Issue the collectives beside backward; their waits order streams, not the host."""
        future = streams.new_future()
        stream.wait_stream(streams.current_stream())
        with streams.on(stream):
            # The allocator must not reuse the tensors while this stream divides them.
            for tensor in (buffer, *also):
                if not tensor.is_sparse:  # which NCCL refuses
                    streams.keep(tensor, stream)
            for work in self._start(buffer, also):
                work.wait()
            future.set_result(buffer)
        return future

    def _finish(self, inflight: InflightBucket, works: list[dist.Work]) -> None:
        beside = self._stream_beside(inflight.bucket.device)
        with contextlib.nullcontext() if beside is None else beside[0].on(beside[1]):
            for work in works:
                inflight.work = work
                inflight.wait()
            inflight.succeed()


def start_average(buffer: Tensor, group: Group) -> dist.Work:
    """Start averaging a bucket densely over the ranks, in place.

    Args:
        buffer: ``[numel]``, or a sparse tensor.
        group: The process group.

    Returns:
        The work to wait for.
    """
    buffer.div_(group.size())
    return all_reduce(buffer, group)


def _when_all_are_done(buffer: Tensor, works: list[dist.Work]) -> Future[Tensor]:
    def own_buffer(done: Future[list[Future[Tensor]]]) -> Tensor:
        for each in done.value():
            each.value()  # raises the error of the collective
        return buffer

    futures = [work.get_future() for work in works]
    future: Future[Tensor] = torch.futures.collect_all(futures).then(own_buffer)
    return future
