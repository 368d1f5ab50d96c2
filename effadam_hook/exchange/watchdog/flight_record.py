"""The record of the buckets that one rank has started for one model, and of what it waits for now."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.futures import Future

from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.status_board import Entry

__all__ = ["FlightRecord"]

_HISTORY_LENGTH = 256


class FlightRecord:
    """The buckets and the holds of one model on this rank.

    A step only appends a bucket and removes it. The record is read when a bucket is late.

    Args:
        run_id: See below.
        name: See below.

    Attributes:
        run_id: Run id of the model: the same on all ranks, and different for every model and run.
        name: Name of the model in messages.
        in_flight: The buckets in flight, by sequence number.
        started: Number of buckets started.
        history: The buckets started last.
        hold: The wait outside a bucket, if any.
        holds: Number of holds started.
        home: Identifier of the thread that attached the model.
        threads: Identifiers of the threads that have run backward passes of the model.
        joined: Identifier of the thread that waits for the buckets at the end of a backward, if
            any.
    """

    def __init__(self, run_id: str, name: str) -> None:
        self.run_id = run_id
        self.name = name
        self.in_flight: dict[int, InflightBucket] = {}
        self.started = 0
        self.history: deque[Entry] = deque(maxlen=_HISTORY_LENGTH)
        self.hold: Hold | None = None
        self.holds = 0
        self.home = threading.get_ident()
        self.threads: set[int] = set()
        self.joined: int | None = None
        self._changing = threading.Lock()
        self._drained = threading.Event()
        self._drained.set()

    def new_bucket(
        self,
        label: str,
        phase: str,
        future: Future[Tensor],
        bucket: Tensor,
        in_backward: bool,
        is_useful: Callable[[], bool],
    ) -> InflightBucket:
        """Make the next bucket, which is not in the record before :meth:`start`.

        Args:
            label: Name of the bucket in messages.
            phase: Its first phase.
            future: The future to complete.
            bucket: DDP's buffer.
            in_backward: Whether the training thread raises errors itself.
            is_useful: Returns whether the exchange still runs.

        Returns:
            The bucket.
        """
        self.threads.add(threading.get_ident())
        return InflightBucket(
            self.started, label, phase, future, bucket, in_backward, is_useful, self.finished
        )

    def start(self, inflight: InflightBucket, mode: str, layout: str) -> None:
        """Record that a bucket has started.

        Args:
            inflight: The bucket.
            mode: Kind of its exchange, the same on every rank.
            layout: Digest of its parameters, the same on every rank.
        """
        self.history.append((inflight.sequence, inflight.label, mode, layout))
        with self._changing:
            self.in_flight[inflight.sequence] = inflight
            self._drained.clear()
        self.started += 1

    def finished(self, inflight: InflightBucket) -> None:
        """Record that the future of a bucket is complete."""
        with self._changing:
            self.in_flight.pop(inflight.sequence, None)
            if not self.in_flight:
                self._drained.set()

    def wait_until_empty(self) -> None:
        """Wait until no bucket is in flight."""
        self._drained.wait()

    @contextlib.contextmanager
    def holding(self, label: str, phase: str) -> Iterator[Hold]:
        """Record that this thread waits for all ranks outside a bucket.

        Args:
            label: Name in messages.
            phase: The first operation.
        """
        outer, hold = self.hold, Hold(self.holds, self.started, label, phase)
        self.holds += 1
        self.hold = hold
        try:
            yield hold
        finally:
            self.hold = outer

    @property
    def oldest(self) -> InflightBucket | Hold | None:
        """The bucket or hold in which this rank has waited for longest."""
        return next(iter(list(self.in_flight.values())), None) or self.hold
