"""The thread of a watchdog, which publishes and reads positions and finds the reason of a wait.

Rounds that find nothing late and hear no alarm send nothing. Otherwise a round has four steps::

    [1] raise the alarm, if a bucket is late or something failed here
    [2] publish the position of this rank
    [3] read the positions of the others
    [4] diagnose: the first of these that holds stops the exchange
          two ranks have started different buckets under one sequence number
          a rank has reported a failure; the loss of a connection counts some seconds later, as it
          follows from a failure elsewhere, and the rank that reports it searches for that
          a rank has ended its training
          threads wait for one another for ever, found twice
          the wait is longer than ``wait_timeout_s``, or a rank is silent while all ranks connect

Any other wait may be mere slowness: it is logged, and ends at the time-out of the process group.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.topology import NodeTable
from effadam_hook.exchange.watchdog.deadlock import Deadlock, Process, find_deadlock
from effadam_hook.exchange.watchdog.diagnosis import (
    disagreement,
    first_failure,
    gone_before,
    no_answer,
    overdue,
    who_is_late,
)
from effadam_hook.exchange.watchdog.flight_record import FlightRecord
from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.status_board import Position, StatusBoard
from effadam_hook.exchange.watchdog.stopping import ANSWER_S, END_S, NOTICE_S, Stopping

__all__ = ["Monitor"]

_BUSY_TICK_S = 0.5
_QUIET_TICK_S = 2.0
_RANKS_PER_TICK_S = 256
_MOST_ERRORS = 5
_MOST_TICK_S = 5.0
"""Longest pause between two rounds while the store does not answer."""

_log = logging.getLogger(__package__)


class Monitor:
    """The thread that watches the buckets of one model.

    Args:
        rank: This rank in the group.
        size: Number of ranks.
        record: The buckets and holds of the model on this rank.
        stopping: The stop of the exchange.
        patience_s: Seconds that a bucket may be in flight before this rank raises the alarm.
        describe: Returns the waits of all threads of this process.
        stop_models: Stops the other models of this process that a deadlock concerns.

    Attributes:
        wait_timeout_s: Seconds after which a wait is an error; None for the process group's
            time-out.
        nodes: The nodes, for messages; None if they are not known.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        record: FlightRecord,
        stopping: Stopping,
        patience_s: float,
        describe: Callable[[], Process],
        stop_models: Callable[[Deadlock, Process, FlightRecord], None],
    ) -> None:
        self.wait_timeout_s: float | None = None
        self.nodes: NodeTable | None = None
        self._rank = rank
        self._record = record
        self._stopping = stopping
        self._patience_s = patience_s
        self._describe = describe
        self._stop_models = stop_models
        self._status_board = StatusBoard(rank, size, record.run_id)
        scale = max(1.0, size / _RANKS_PER_TICK_S)
        self._busy_tick_s, self._quiet_tick_s = _BUSY_TICK_S * scale, _QUIET_TICK_S * scale
        self._suspected: tuple[Deadlock | None, float] = (None, 0.0)
        self._alarm_until = 0.0
        self._round_done = threading.Condition()
        self._wake = threading.Event()
        self._lost_since: float | None = None
        self._warned: InflightBucket | Hold | None = None
        self._errors = 0
        self._thread: threading.Thread | None = None
        if size > 1:
            # A daemon, so that a rank whose store is gone can still end.
            self._thread = threading.Thread(target=self._run, name="effadam-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread; a group of one rank needs none."""
        if self._thread is not None:
            self._thread.start()

    def wake(self) -> None:
        """Start the next round at once."""
        self._wake.set()

    def join(self) -> bool:
        """Wait for the end of the thread; return False without one, or from within it."""
        if self._thread is None or self._thread is threading.current_thread():
            return False
        self._thread.join(timeout=END_S)
        return True

    def consult(self, kind: type[EffAdamError], message: str) -> EffAdamError:
        """Request the positions of the other ranks once, and add their information to an error.

        Args:
            kind: Class of the error.
            message: Its text.

        Returns:
            The error; another class where a rank has found the cause.
        """
        if self._thread is None or self._thread is threading.current_thread():
            return kind(message)
        began = time.monotonic()
        with self._round_done:
            self._wake.set()
            self._round_done.wait_for(lambda: not self._status_board.silent_since(began), ANSWER_S)
        if issubclass(kind, DisagreementError):
            return kind(message)
        positions = self._status_board.positions()
        # A rank that finds a disagreement ends; the other ranks see that as a lost connection.
        found = self._disagreement(positions)
        if found is not None:
            return DisagreementError(f"{message} {found}")
        # The cause that a rank has found says more than the end of its connections.
        failure = first_failure({rank: p for rank, p in positions.items() if p.is_cause})
        if failure is not None:
            return type(failure)(f"{message} {failure}")
        late = self._who_is_late(positions, began)
        if not late and (failure := first_failure(positions)) is not None:
            late = f" {failure}"
        return kind(message + late)

    def announce(self, failure: EffAdamError) -> None:
        """Publish the cause of a stop before this rank ends, and its connections with it.

        Args:
            failure: The error that was found here.
        """
        self._stopping.report(failure, is_cause=True)
        self._status_board.raise_alarm()
        self._publish()

    def _run(self) -> None:
        while not self._stopping.is_closing:
            self._wake.wait(self._tick_s())
            self._wake.clear()
            try:
                if not self._status_board.is_reachable():
                    break
                self._round()
                self._errors = 0
            except Exception as error:
                self._errors += 1
                if self._errors == _MOST_ERRORS:
                    _log.warning("Rank %d cannot reach the store: %s", self._rank, error)
                self._check_alone(error)
            with self._round_done:
                self._round_done.notify_all()
        if self._stopping.is_closing:
            with contextlib.suppress(Exception):
                self._publish()
        elif self._stopping.begin_closing():
            self._stopping.close()

    def _tick_s(self) -> float:
        record = self._record
        busy = record.in_flight or record.hold or time.monotonic() < self._alarm_until
        tick_s = self._busy_tick_s if busy else self._quiet_tick_s
        return min(tick_s * 2.0**self._errors, max(tick_s, _MOST_TICK_S))

    def _check_alone(self, error: Exception) -> None:
        """Stop an overdue wait without the positions of the others, as the store does not answer."""
        oldest = self._record.oldest
        if oldest is None or self._stopping.failure is not None:
            return
        reason = str(error).partition("\n")[0].rstrip(".")
        late = f" The store of the process group does not answer: {reason}."
        diagnosis = overdue(oldest, self.wait_timeout_s, 0, False, late)
        if diagnosis is None:
            return
        if self._stopping.begin(self._failure(diagnosis, oldest)):
            self._stopping.complete()

    def _failure(
        self, diagnosis: EffAdamError, oldest: InflightBucket | Hold | None
    ) -> EffAdamError:
        """Return an error that also says where this rank is."""
        where = f"Rank {self._rank}"
        if oldest is not None:
            where += f", {oldest.label}, {oldest.phase}"
        return type(diagnosis)(f"{where}: {diagnosis}")

    def _round(self) -> None:
        now = time.monotonic()
        oldest = self._record.oldest
        patience_s = self._patience_s
        if self.wait_timeout_s is not None:  # the answers of the others must arrive by then
            patience_s = min(patience_s, self.wait_timeout_s - ANSWER_S)
        is_late = oldest is not None and now - oldest.since > patience_s
        if is_late or self._stopping.reported is not None:  # [1]
            self._status_board.raise_alarm()
            self._alarm_until = now + 3 * _QUIET_TICK_S
        if self._status_board.hears_alarm():
            self._alarm_until = now + 3 * _QUIET_TICK_S
        if now > self._alarm_until:
            return
        process = self._publish()  # [2]
        self._status_board.read()  # [3]
        if self._stopping.failure is None:
            self._diagnose(oldest, process)  # [4]

    def _publish(self) -> Process:
        oldest, process = self._record.oldest, self._describe()
        elsewhere = next((wait.doing for wait in process.waits.values() if wait), None)
        doing = elsewhere or "is not in a backward pass"
        if isinstance(oldest, Hold):
            doing = f"{oldest.doing}, {oldest.phase}"
        elif oldest is not None:
            doing = f"is in {oldest.label}, {oldest.phase}"
        failure = self._stopping.reported
        self._status_board.publish(
            Position(
                self._record.started,
                doing,
                self._stopping.is_closing,
                None if failure is None else str(failure),
                type(failure).__name__,
                list(self._record.history),
                process,
                self._stopping.is_cause,
            )
        )
        return process

    def _diagnose(self, oldest: InflightBucket | Hold | None, process: Process) -> None:
        positions = self._status_board.positions()
        diagnosis = self._disagreement(positions) or self._reported(positions)
        if diagnosis is None and self._lost_since is not None:
            return
        if diagnosis is None and oldest is not None:
            diagnosis = gone_before(positions, oldest.sequence)
        is_first, deadlock = False, None
        if diagnosis is None:
            deadlock = self._deadlock(positions, process)
            diagnosis = deadlock.error if deadlock else self._overdue(positions, oldest)
            is_first = diagnosis is not None
        if diagnosis is None:
            self._warn(positions, oldest)
            return
        failure = self._failure(diagnosis, oldest)
        begins = self._stopping.begin(failure)
        try:
            if begins and is_first:
                self.announce(failure)
                if oldest is None:  # this rank may not reach another backward, which would raise it
                    _log.error("%s", failure)
            if deadlock is not None:
                self._stop_models(deadlock, process, self._record)
            if begins:
                # The end of this rank closes connections of ranks that have not read the failure yet.
                self._stopping.wait(NOTICE_S)
        finally:
            if begins:
                self._stopping.complete()

    def _disagreement(self, positions: Mapping[int, Position]) -> DisagreementError | None:
        histories = {rank: position.history for rank, position in positions.items()}
        return disagreement({**histories, self._rank: list(self._record.history)})

    def _reported(self, positions: Mapping[int, Position]) -> EffAdamError | None:
        """Return the failure that another rank reports."""
        cause = first_failure({rank: p for rank, p in positions.items() if p.is_cause})
        failure = cause or first_failure(positions)
        if cause is not None or failure is None:
            self._lost_since = None
            return cause
        # This rank may have no connection to the rank that is lost, as between nodes.
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
        if now - self._lost_since < ANSWER_S + NOTICE_S:
            return None
        late = no_answer(self._status_board.silent_since(self._lost_since), self.nodes)
        return failure if late in str(failure) else type(failure)(f"{failure}{late}")

    def _who_is_late(self, positions: Mapping[int, Position], since: float) -> str:
        silent = self._status_board.silent_since(since)
        return who_is_late(positions, silent, self._record.started, self.nodes)

    def _deadlock(self, positions: Mapping[int, Position], process: Process) -> Deadlock | None:
        """Return a deadlock that all of its ranks have confirmed, if any."""
        others = {p.process.rank: p.process for p in positions.values() if p.process and not p.left}
        found = find_deadlock({**others, process.rank: process}, self._record.run_id)
        suspected, since = self._suspected
        if found is None or suspected is None or found.waits != suspected.waits:
            self._suspected = (found, time.monotonic())
            return None
        for rank in self._status_board.silent_since(since):
            position = positions.get(rank)
            if position and position.process and position.process.rank in found.ranks:
                return None
        return found

    def _overdue(
        self, positions: Mapping[int, Position], oldest: InflightBucket | Hold | None
    ) -> EffAdamError | None:
        if oldest is None:
            return None
        moment = time.monotonic() - ANSWER_S
        silent = self._status_board.silent_since(moment)
        late = self._who_is_late(positions, moment)
        grace_s = ANSWER_S if silent else 0
        return overdue(oldest, self.wait_timeout_s, grace_s, bool(silent), late)

    def _warn(
        self, positions: Mapping[int, Position], oldest: InflightBucket | Hold | None
    ) -> None:
        """Log once that a bucket or hold is late."""
        if oldest is None or self._warned is oldest:
            return
        waited_s = time.monotonic() - oldest.since
        if waited_s > self._patience_s + ANSWER_S:
            self._warned = oldest
            late = self._who_is_late(positions, time.monotonic() - ANSWER_S)
            _log.warning(
                "Rank %d has waited %.0f s in %s, %s.%s",
                *(self._rank, waited_s, oldest.label, oldest.phase, late),
            )
