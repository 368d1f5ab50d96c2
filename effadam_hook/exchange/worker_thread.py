"""A worker thread: it processes buckets one at a time, in order, and its errors reach their futures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from effadam_hook.exchange.watchdog.inflight import InflightBucket
from effadam_hook.exchange.watchdog.stopping import END_S
from effadam_hook.exchange.watchdog.watchdog import Watchdog

__all__ = ["WorkerThread"]

T = TypeVar("T")


class WorkerThread(Generic[T]):
    """A thread that processes buckets, first in, first out.

    Args:
        name: Name of the thread.
        step: Called with each bucket; not called any more after an error.
        watchdog: Stops the exchange after an error.
    """

    def __init__(
        self, name: str, step: Callable[[InflightBucket, T], None], watchdog: Watchdog
    ) -> None:
        self._queue: SimpleQueue[tuple[InflightBucket, T] | None] = SimpleQueue()
        self._working = threading.Lock()
        # A daemon, so that a rank whose peer is gone can still end.
        self._thread = threading.Thread(
            target=_run, args=(self._queue, self._working, step, watchdog), name=name, daemon=True
        )
        self._thread.start()

    def put(self, inflight: InflightBucket, job: T) -> None:
        """Append a bucket."""
        self._queue.put((inflight, job))

    def settle(self) -> None:
        """Wait for the end of a step that has outlived its bucket, which an error has completed."""
        if self._working.acquire(timeout=END_S):
            self._working.release()

    def close(self) -> None:
        """End the thread; a collective in progress is left to the time-out of its group."""
        self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=END_S)


def _run(
    queue: SimpleQueue[tuple[InflightBucket, T] | None],
    working: threading.Lock,
    step: Callable[[InflightBucket, T], None],
    watchdog: Watchdog,
) -> None:
    while (item := queue.get()) is not None:
        inflight, job = item
        try:
            if not watchdog.is_going_on():
                raise watchdog.failure or RuntimeError("the exchange was closed.")
            with working:
                step(inflight, job)
        except BaseException as error:
            watchdog.broke(inflight, error)
        del item, inflight, job
