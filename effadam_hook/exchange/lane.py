"""A thread that takes buckets one at a time, in order, and whose errors reach their futures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from effadam_hook.exchange.passage import Passage
from effadam_hook.exchange.watchdog import END_S, Watch

__all__ = ["Lane"]

T = TypeVar("T")


class Lane(Generic[T]):
    """First in, first out.

    Args:
        name: The thread's name.
        step: What is done with a bucket. After an error nothing is started any more.
        watch: Hears of errors.
    """

    def __init__(self, name: str, step: Callable[[Passage, T], None], watch: Watch) -> None:
        self._queue: SimpleQueue[tuple[Passage, T] | None] = SimpleQueue()
        # A daemon, so that a rank whose peer is gone can still end.
        self._thread = threading.Thread(
            target=_run, args=(self._queue, step, watch), name=name, daemon=True
        )
        self._thread.start()

    def put(self, passage: Passage, job: T) -> None:
        """Append a bucket."""
        self._queue.put((passage, job))

    def close(self) -> None:
        """End the thread; a collective under way is left to its group's time-out."""
        self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=END_S)


def _run(
    queue: SimpleQueue[tuple[Passage, T] | None], step: Callable[[Passage, T], None], watch: Watch
) -> None:
    while (item := queue.get()) is not None:
        passage, job = item
        try:
            if not watch.is_going_on():
                raise watch.failure or RuntimeError("the exchange was closed.")
            step(passage, job)
        except BaseException as error:
            watch.broke(passage, error)
        del item, passage, job
