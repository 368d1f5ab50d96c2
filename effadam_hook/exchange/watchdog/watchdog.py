"""Notices when ranks wait for one another in vain, finds out why, and tells every rank.

A rank that waits in a collective cannot know whether the others are slow, gone, or waiting in another
one. So each rank keeps a list of the buckets that it has started, and a thread looks at it now and
then. Nothing else happens while training goes on: no message, no lock shared with it. Only when a
bucket has been under way for some seconds, or something broke, does this rank *raise the alarm*:
every rank then writes its *position* on a board (``board.py``) and reads the others'::

    training  ── enter ──► pending ── succeed ──►                 (all that a normal step sees)
    thread            [1] late, or broken?      ──► alarm          [2] publish the own position
                      [3] read the others'      ──► [4] verdict    ──► every pending bucket fails

The verdicts (``verdict.py``), in this order: two ranks have done different things at the same place in
the sequence of buckets; a rank has reported a failure, which may be a connection lost to one that saw
the first; a rank has left. Anything else may be mere slowness: it is logged, and the process group's
time-out decides.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.waiting import phase as waiting_phase
from effadam_hook.exchange.watchdog.deadlock import Deadlock, Process, find_deadlock
from effadam_hook.exchange.watchdog.diagnosis import (
    disagreement,
    first_failure,
    gone_before,
    who_is_late,
)
from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.process import describe_process, open_watchdogs
from effadam_hook.exchange.watchdog.status_board import Entry, Position, StatusBoard

__all__ = ["CONNECTING", "END_S", "Watchdog"]

CONNECTING = "connecting"
"""The phase in which Gloo connects ranks that have all come there."""

PATIENCE_S = 3.0
"""How long a bucket may be under way before the other ranks are asked."""
ANSWER_S = 2.5
"""How long a failing rank waits for what the others know, before it raises."""
CONNECT_S = 15.0
"""How long a silent rank is waited for while all ranks make connections at once."""
NOTICE_S = 1.2
"""How long a rank that has found something out gives the others to read it: two of their ticks."""
END_S = 5.0
"""How long to wait for a thread that has been asked to end, as it does at once on an idle machine."""

_BUSY_TICK_S = 0.5
_IDLE_TICK_S = 2.0
_RANKS_PER_TICK_S = 256
_REMEMBERED = 256
_MOST_ERRORS = 5

_log = logging.getLogger(__name__)


class Watchdog:
    """One rank's list of buckets under way, and the thread that looks after it.

    Attributes:
        rank: This rank in the group.
        pending: The buckets under way, by their place in the sequence.
        failure: Why the exchange has stopped, if it has.
        is_in_backward: Whether the training thread raises errors itself, with :meth:`check`.
        wait_timeout_s: Seconds after which a bucket that waits is an error; None for the process
            group's time-out.
        run_id: The same on all ranks, and no other watchdog's: keys in the store begin with it.
        name: How messages name the model.
        held: The wait outside a bucket, if any.
        holds: How many of those have been started.
        home: The thread that attached the model.
        threads: The threads that have run backward passes of the model.
        joined: The thread that waits for the buckets at the end of a backward, if one does.

    Args:
        group: DDP's process group.
        run_id: See above.
        name: See above.
    """

    def __init__(self, group: dist.ProcessGroup, run_id: str, name: str = "the model") -> None:
        self.rank = group.rank()
        self.pending: dict[int, InflightBucket] = {}
        self.failure: EffAdamError | None = None
        self.is_in_backward = False
        self.wait_timeout_s: float | None = None
        self.run_id = run_id
        self.name = name
        self.held: Hold | None = None
        self.holds = 0
        self.home = threading.get_ident()
        self.threads: set[int] = set()
        self.joined: int | None = None
        self._refusal: EffAdamError | None = None
        self._size = group.size()
        self._sequence = 0
        self._history: deque[Entry] = deque(maxlen=_REMEMBERED)
        self._on_failure: list[Callable[[], None]] = []
        self._on_close: list[Callable[[], None]] = []
        self._stopping = threading.Lock()
        self._ended = threading.Event()
        self._counting = threading.Lock()
        self._drained = threading.Event()
        self._drained.set()
        self._own_failure: EffAdamError | None = None
        self._status_board = StatusBoard(self.rank, self._size, run_id)
        self._is_cause = False
        self._suspected: tuple[Deadlock | None, float] = (None, 0.0)
        self._alarm_until = 0.0
        self._round_done = threading.Condition()
        self._wake = threading.Event()
        self._closing = False
        self._closing_once = threading.Lock()
        self._warned = -1
        self._errors = 0
        self._thread: threading.Thread | None = None
        if self._size > 1:
            # A daemon, so that a rank whose store is gone can still end.
            self._thread = threading.Thread(target=self._run, name="effadam-watchdog", daemon=True)
            self._thread.start()
        open_watchdogs.add(self)

    @property
    def sequence(self) -> int:
        """How many buckets have been started."""
        return self._sequence

    @contextlib.contextmanager
    def hold(self, label: str, phase: str) -> Iterator[Hold]:
        """Note that this thread waits for all ranks outside a bucket; every rank must do so.

        Args:
            label: How messages name it.
            phase: What is done first; the yielded object's ``phase`` may be set to what follows.

        Raises:
            EffAdamError: If a collective has failed or another rank has; all ranks are told.
        """
        held, outer = Hold(self.holds, self._sequence, label, phase), self.held
        self.holds += 1
        self.held = held
        try:
            with waiting_phase(self.rank, label, self.is_going_on):
                yield held
        except BaseException as error:
            failure = self.stop(label, held.phase, error)
            if isinstance(error, RuntimeError):
                raise failure from failure.__cause__
            raise
        finally:
            self.held = outer

    def enter(
        self,
        label: str,
        mode: str,
        layout: str,
        phase: str,
        bucket: Tensor,
        future: Future[Tensor] | None = None,
    ) -> InflightBucket:
        """Note that a bucket sets out.

        Args:
            label: How messages name it.
            mode: What is done with it, the same on every rank.
            layout: What it is made of, the same on every rank.
            phase: Its first phase.
            bucket: DDP's buffer.
            future: The future to complete; None makes one for CPU tensors.

        Returns:
            Its inflight; over already, with an error, if the exchange has stopped.
        """
        future = future or Future()
        self.threads.add(threading.get_ident())
        inflight = InflightBucket(
            self, self._sequence, label, phase, future, bucket, self.is_in_backward
        )
        if self.failure is not None or self._closing:
            if self.failure is not None:
                self._ended.wait(2 * ANSWER_S)
            reason = self.failure or "it was closed."
            kind = EffAdamError if self.failure is None else type(self.failure)
            self._refusal = self._refusal or kind(
                f"Rank {self.rank}, {label}: not started, the exchange has stopped: {reason} "
                "Restart all ranks from a checkpoint."
            )
            inflight.fail(self._refusal)
            return inflight
        self._history.append((self._sequence, label, mode, layout))
        with self._counting:
            self.pending[self._sequence] = inflight
            self._drained.clear()
        self._sequence += 1
        return inflight

    def finished(self, inflight: InflightBucket) -> None:
        """Note that a bucket has arrived, or failed."""
        with self._counting:
            self.pending.pop(inflight.sequence, None)
            if not self.pending:
                self._drained.set()

    def is_going_on(self) -> bool:
        """Whether there is any use in waiting."""
        return self.failure is None and not self._closing

    def on_failure(self, action: Callable[[], None]) -> None:
        """Have something done when the exchange stops for good with buckets under way."""
        self._on_failure.append(action)

    def on_close(self, action: Callable[[], None]) -> None:
        """Have something done when training is over."""
        self._on_close.append(action)

    def broke(self, inflight: InflightBucket, error: BaseException) -> None:
        """Stop the exchange because of an error on this rank, and let the other ranks know.

        Args:
            inflight: Where it happened.
            error: What happened.
        """
        inflight.fail(self.stop(inflight.label, inflight.phase, error))

    def stop(self, label: str, phase: str, error: BaseException) -> EffAdamError:
        """Stop the exchange because of an error on this rank, and let the other ranks know.

        Args:
            label: In which bucket, or in what else, it happened.
            phase: What was being done.
            error: What happened.

        Returns:
            Why the exchange has stopped: this error, or an earlier one.
        """
        kind = type(error) if isinstance(error, EffAdamError) else EffAdamError
        message = f"Rank {self.rank}, {label}, {phase}: {_sentence(error)}"
        if self._first_to_stop(kind(message)):
            self._is_cause = isinstance(error, EffAdamError) or not isinstance(error, RuntimeError)
            self._own_failure = kind(message)
            failure = kind(message)
            if isinstance(error, Exception):
                failure = self._consult(kind, message)
            self._wake.set()
            failure.__cause__ = error
            self.failure = self._own_failure = failure
            self._end_all()
        else:
            # Whoever stopped it may still be asking the others; its message says more.
            self._ended.wait(2 * ANSWER_S)
        return self.failure or kind(message)

    def join(self) -> None:
        """Wait for all buckets under way, in the training thread, where Ctrl-C is heard."""
        self.joined = threading.get_ident()
        try:
            self._drained.wait()
        except KeyboardInterrupt as error:
            self.stop("the end of backward", "waiting for the buckets", error)
            raise
        finally:
            self.joined = None

    def check(self) -> None:
        """Raise what went wrong, if anything did.

        Raises:
            EffAdamError: If the exchange has stopped.
        """
        error = self._refusal or self.failure
        if error is not None:
            raise error

    def close(self) -> None:
        """End the threads. The other ranks learn that this one has left if they wait for it."""
        with self._closing_once:
            is_first, self._closing = not self._closing, True
        self._wake.set()
        if is_first:
            if self.pending:
                self._run_actions(self._on_failure)
            self._run_actions(self._on_close)
        # Also if the thread itself has begun to close: the interpreter must not end before it.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=END_S)
            open_watchdogs.discard(self)

    # Stopping

    def _first_to_stop(self, failure: EffAdamError) -> bool:
        with self._stopping:
            if self.failure is not None:
                return False
            self.failure = failure
            return True

    def _end_all(self) -> None:
        assert self.failure is not None
        self._run_actions(self._on_failure)
        for inflight in list(self.pending.values()):
            inflight.fail(self.failure)
        self._ended.set()

    def _run_actions(self, actions: list[Callable[[], None]]) -> None:
        # A failing lane and whoever closes may both be here, and every action is for one of them.
        while True:
            try:
                action = actions.pop()
            except IndexError:
                return
            action()

    def _consult(self, kind: type[EffAdamError], message: str) -> EffAdamError:
        """An error with what the others know, who are asked for once."""
        if self._thread is None or self._thread is threading.current_thread():
            return kind(message)
        asked = time.monotonic()
        with self._round_done:
            self._wake.set()
            self._round_done.wait_for(lambda: not self._status_board.silent_since(asked), ANSWER_S)
        if issubclass(kind, DisagreementError):
            return kind(message)
        positions = self._status_board.positions()
        # Who finds a disagreement ends, and to the others that looks like a lost connection.
        found = self._disagreement()
        if found is not None:
            return DisagreementError(f"{message} {found}")
        # And who has found that ranks wait for ever: that says more than the end of its connections.
        failure = first_failure({rank: p for rank, p in positions.items() if p.is_cause})
        if failure is not None:
            return type(failure)(f"{message} {failure}")
        late = who_is_late(positions, self._status_board.silent_since(asked), self._sequence)
        if not late and (failure := first_failure(positions)) is not None:
            late = f" {failure}"
        return kind(message + late)

    def _disagreement(self) -> DisagreementError | None:
        histories = {rank: p.history for rank, p in self._status_board.positions().items()}
        return disagreement({**histories, self.rank: list(self._history)})

    # The thread

    def _run(self) -> None:
        while not self._closing:
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
                    _log.warning("Rank %d cannot reach the store: %s", self.rank, error)
                    return
            with self._round_done:
                self._round_done.notify_all()
        if self._closing:
            with contextlib.suppress(Exception):
                self._publish()
        else:
            self.close()

    def _tick_s(self) -> float:
        scale = max(1.0, self._size / _RANKS_PER_TICK_S)
        busy = self.pending or self.held or time.monotonic() < self._alarm_until
        return (_BUSY_TICK_S if busy else _IDLE_TICK_S) * scale

    def _round(self) -> None:
        now = time.monotonic()
        oldest = self._oldest()
        patience_s = PATIENCE_S
        if self.wait_timeout_s is not None:  # the others' answers are wanted by then
            patience_s = min(patience_s, self.wait_timeout_s - ANSWER_S)
        late = oldest is not None and now - oldest.since > patience_s
        if late or self._own_failure is not None:  # [1]
            self._status_board.raise_alarm()
            self._alarm_until = now + 3 * _IDLE_TICK_S
        if self._status_board.hears_alarm():
            self._alarm_until = now + 3 * _IDLE_TICK_S
        if now > self._alarm_until:
            return
        process = self._publish()  # [2]
        self._status_board.read()  # [3]
        if self.failure is None:
            self._judge(oldest, process)  # [4]

    def _oldest(self) -> InflightBucket | Hold | None:
        """What this rank has waited in for longest."""
        return next(iter(list(self.pending.values())), None) or self.held

    def _publish(self) -> Process:
        oldest, process = self._oldest(), describe_process()
        elsewhere = next((wait.doing for wait in process.waits.values() if wait), None)
        doing = elsewhere or "is not in a backward pass"
        if isinstance(oldest, Hold):
            doing = f"{oldest.doing}, {oldest.phase}"
        elif oldest is not None:
            doing = f"is in {oldest.label}, {oldest.phase}"
        failure = self._own_failure
        self._status_board.publish(
            Position(
                self._sequence,
                doing,
                self._closing,
                None if failure is None else str(failure),
                type(failure).__name__,
                list(self._history),
                process,
                self._is_cause,
            )
        )
        return process

    def _judge(self, oldest: InflightBucket | Hold | None, process: Process) -> None:
        positions = self._status_board.positions()
        verdict = self._disagreement() or first_failure(positions)
        if verdict is None and oldest is not None:
            verdict = gone_before(positions, oldest.sequence)
        own = None
        if verdict is None:
            verdict = own = self._deadlock(positions, process) or self._overdue(positions, oldest)
        if verdict is not None:
            where = f"Rank {self.rank}"
            if oldest is not None:
                where += f", {oldest.label}, {oldest.phase}"
            failure = type(verdict)(f"{where}: {verdict}")
            if self._first_to_stop(failure):
                if own is not None:
                    self._announce(failure)
                    if oldest is None:  # this rank may not come to the next backward
                        _log.error("%s", failure)
                # The end of this rank closes connections of ranks that have not read it yet.
                self._ended.wait(NOTICE_S)
                self._end_all()
        elif oldest is not None and self._warned != oldest.sequence:
            waited_s = time.monotonic() - oldest.since
            if waited_s > PATIENCE_S + ANSWER_S:
                self._warned = oldest.sequence
                silent = self._status_board.silent_since(time.monotonic() - ANSWER_S)
                late = who_is_late(positions, silent, self._sequence)
                _log.warning(
                    "Rank %d has waited %.0f s in %s, %s.%s",
                    *(self.rank, waited_s, oldest.label, oldest.phase, late),
                )

    def _deadlock(self, positions: Mapping[int, Position], process: Process) -> EffAdamError | None:
        """That ranks wait for one another for ever, if they have said so twice."""
        others = {p.process.rank: p.process for p in positions.values() if p.process and not p.left}
        found = find_deadlock({**others, process.rank: process}, self.run_id)
        suspected, since = self._suspected
        if found is None or suspected is None or found.waits != suspected.waits:
            self._suspected = (found, time.monotonic())
            return None
        for rank in self._status_board.silent_since(since):
            position = positions.get(rank)
            if position and position.process and position.process.rank in found.ranks:
                return None
        # A thread that is stuck runs none of its other models either, and ranks may wait there.
        own = {thread for (rank, thread), _ in found.waits if rank == process.rank}
        stopped = {run_id for run_id, run in process.runs.items() if set(run.threads) <= own}
        for watchdog in list(open_watchdogs):
            if (
                watchdog.run_id in found.runs | stopped
                and watchdog is not self
                and isinstance(watchdog, Watchdog)
            ):
                watchdog.stop_for(found.error)
        return found.error

    def stop_for(self, error: EffAdamError) -> None:
        """Stop for what another watch of this process has found, and let the other ranks know."""
        failure = type(error)(f"Rank {self.rank}, {self.name}: {error}")
        if self._first_to_stop(failure):
            self._announce(failure)
            self._ended.wait(NOTICE_S)
            self._end_all()

    def _announce(self, failure: EffAdamError) -> None:
        """Let the other ranks read a failure before this one ends and its connections with it."""
        self._own_failure, self._is_cause = failure, True
        self._status_board.raise_alarm()
        self._publish()

    def _overdue(
        self, positions: Mapping[int, Position], oldest: InflightBucket | Hold | None
    ) -> EffAdamError | None:
        """That this rank has waited for too long, if it has."""
        if oldest is None:
            return None
        waited_s, limit_s = time.monotonic() - oldest.since, self.wait_timeout_s
        silent = self._status_board.silent_since(time.monotonic() - ANSWER_S)
        late = who_is_late(positions, silent, self._sequence)
        if limit_s is not None and waited_s > limit_s + (ANSWER_S if silent else 0):
            return EffAdamError(
                f"waited {waited_s:.0f} s, longer than wait_timeout_s={limit_s:g}.{late} Raise "
                "state.wait_timeout_s where ranks may be that slow; otherwise give all of them as "
                "much work."
            )
        # All ranks have just been here: one that is silent now has died before it was connected.
        if (
            isinstance(oldest, Hold)
            and oldest.phase == CONNECTING
            and waited_s > CONNECT_S
            and silent
        ):
            return EffAdamError(f"not connected after {waited_s:.0f} s.{late} Restart all ranks.")
        return None


def _sentence(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


@atexit.register
def _close_all() -> None:
    for watchdog in list(open_watchdogs):
        if isinstance(watchdog, Watchdog):
            watchdog.close()
