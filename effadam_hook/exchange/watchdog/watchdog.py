"""The watchdog of an exchange, which finds ranks that wait in vain and reports the reason everywhere.

A rank that waits in a collective cannot see whether the others are slow, gone, or in another
collective. Each rank therefore records the buckets that it starts (``flight_record.py``), and a
thread reads the record twice a second (``monitor.py``). A normal step sends nothing. When a bucket
is late, or an error occurs, the rank raises the alarm; every rank then publishes its position on a
status board in the process group's store (``status_board.py``), and every rank draws the same
conclusion (``diagnosis.py``, ``deadlock.py``)::

    training thread    enter ──► in flight ──► succeed          (all that a normal step does)
    monitor thread     late, or failed? ──► alarm ──► positions of all ranks ──► diagnosis
    either of them     Stopping: the first error counts, every bucket in flight fails with it
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import DefaultStore
from effadam_hook.exchange.topology import NodeTable
from effadam_hook.exchange.waiting import phase as waiting_phase
from effadam_hook.exchange.watchdog.deadlock import Deadlock, Process
from effadam_hook.exchange.watchdog.flight_record import FlightRecord
from effadam_hook.exchange.watchdog.inflight import CONNECTING, Hold, InflightBucket
from effadam_hook.exchange.watchdog.monitor import Monitor
from effadam_hook.exchange.watchdog.process import describe_process
from effadam_hook.exchange.watchdog.stopping import ANSWER_S, NOTICE_S, Stopping

__all__ = ["CONNECTING", "Watchdog"]

PATIENCE_S = 3.0
"""Seconds that a bucket may be in flight before the positions of the other ranks are requested."""
_MEET_S, _MOST_MEET_S = 1e-3, 0.1  # pauses between two looks at who has come


class Watchdog:
    """The watchdog of one model's buckets on this rank.

    Args:
        group: DDP's process group.
        run_id: Run id of the model, the same on all ranks and different for every model and run.
        name: Name of the model in messages.

    Attributes:
        rank: This rank in the group.
        record: The buckets and holds of this rank.
        is_in_backward: Whether the training thread raises errors itself, with :meth:`check`.
    """

    def __init__(self, group: dist.ProcessGroup, run_id: str, name: str = "the model") -> None:
        self.rank = group.rank()
        self.record = FlightRecord(run_id, name)
        self._size = group.size()
        self._meetings = 0
        self._store = DefaultStore(f"effadam/{run_id}")
        self.is_in_backward = False
        self._stopping = Stopping(self.record)
        self._monitor = Monitor(
            self.rank,
            group.size(),
            self.record,
            self._stopping,
            PATIENCE_S,
            _describe_process,
            _stop_models,
        )
        self._monitor.start()
        _open_watchdogs.add(self)

    @property
    def run_id(self) -> str:
        """The run id of the model."""
        return self.record.run_id

    @property
    def failure(self) -> EffAdamError | None:
        """The error that has stopped the exchange; None while it runs."""
        return self._stopping.failure

    @property
    def wait_timeout_s(self) -> float | None:
        """Seconds after which a wait is an error; None for the process group's time-out."""
        return self._monitor.wait_timeout_s

    @wait_timeout_s.setter
    def wait_timeout_s(self, value: float | None) -> None:
        self._monitor.wait_timeout_s = value

    def name_nodes(self, nodes: NodeTable) -> None:
        """Have messages name the nodes of ranks."""
        self._monitor.nodes = nodes

    def is_going_on(self) -> bool:
        """Return whether the exchange runs, so that waiting for other ranks is useful."""
        return self._stopping.is_running

    def on_failure(self, action: Callable[[], None]) -> None:
        """Register an action for a stop with buckets in flight."""
        self._stopping.on_failure(action)

    def on_close(self, action: Callable[[], None]) -> None:
        """Register an action for the end of training."""
        self._stopping.on_close(action)

    @contextlib.contextmanager
    def hold(self, label: str, phase: str) -> Iterator[Hold]:
        """Wait for all ranks outside a bucket; every rank must do so.

        Args:
            label: Name in messages.
            phase: The first operation; set the ``phase`` of the yielded object to those that
                follow.

        Raises:
            EffAdamError: If a collective or another rank has failed; every rank raises it.
        """
        with self.record.holding(label, phase) as hold:
            try:
                with waiting_phase(self.rank, label, self.is_going_on):
                    yield hold
            except BaseException as error:
                failure = self.stop(label, hold.phase, error)
                if isinstance(error, RuntimeError):
                    raise failure from failure.__cause__
                raise

    def meet(self) -> bool:
        """Wait for all ranks, within a bucket or a hold, before collectives that some may not start.

        The ranks meet in the store, so that one that does something else is found before messages of
        different kinds are mixed.

        Returns:
            Whether all have come; False if the exchange has stopped.
        """
        if self._size == 1:
            return True
        self._meetings += 1
        key, pause_s = f"meeting {self._meetings}", _MEET_S
        arrived = self._store.add(key, 1)
        while arrived < self._size and self.is_going_on():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_MEET_S)
            arrived = self._store.add(key, 0)
        return self.is_going_on()

    def enter(
        self,
        label: str,
        mode: str,
        layout: str,
        phase: str,
        bucket: Tensor,
        future: Future[Tensor] | None = None,
    ) -> InflightBucket:
        """Start a bucket.

        Args:
            label: Name of the bucket in messages.
            mode: Kind of its exchange, the same on every rank.
            layout: Digest of its parameters, the same on every rank.
            phase: Its first phase.
            bucket: DDP's buffer.
            future: The future to complete; None makes one for CPU tensors.

        Returns:
            The bucket in flight; complete already, with an error, if the exchange has stopped.
        """
        inflight = self.record.new_bucket(
            label, phase, future or Future(), bucket, self.is_in_backward, self.is_going_on
        )
        if self._stopping.is_running:
            self.record.start(inflight, mode, layout)
        else:
            inflight.fail(self._stopping.refuse(f"Rank {self.rank}, {label}"))
        return inflight

    def broke(self, inflight: InflightBucket, error: BaseException) -> None:
        """Stop the exchange because of an error in a bucket, and report it to the other ranks.

        Args:
            inflight: The bucket.
            error: The error.
        """
        inflight.fail(self.stop(inflight.label, inflight.phase, error))

    def stop(self, label: str, phase: str, error: BaseException) -> EffAdamError:
        """Stop the exchange because of an error on this rank, and report it to the other ranks.

        Args:
            label: The bucket or operation in which it occurred.
            phase: The phase of that.
            error: The error.

        Returns:
            The error that has stopped the exchange: this one, or an earlier one.
        """
        kind = type(error) if isinstance(error, EffAdamError) else EffAdamError
        message = f"Rank {self.rank}, {label}, {phase}: {_sentence(error)}"
        if self._stopping.begin(kind(message)):
            is_cause = isinstance(error, EffAdamError) or not isinstance(error, RuntimeError)
            self._stopping.report(kind(message), is_cause)
            try:
                failure = kind(message)
                if isinstance(error, Exception):
                    failure = self._monitor.consult(kind, message)
                self._monitor.wake()
                failure.__cause__ = error
                self._stopping.extend(failure)
            finally:
                self._stopping.complete()
        else:
            # The thread that stopped it may still consult the other ranks; its message says more.
            self._stopping.wait(2 * ANSWER_S)
        return self._stopping.failure or kind(message)

    def begin_stop_for(self, error: EffAdamError) -> bool:
        """Begin to stop for an error that the watchdog of another model has found, and report it.

        Args:
            error: The error.

        Returns:
            Whether the exchange still ran; :meth:`complete_stop` must follow then.
        """
        failure = type(error)(f"Rank {self.rank}, {self.record.name}: {error}")
        if not self._stopping.begin(failure):
            return False
        # Without the store this process must stop all the same.
        with contextlib.suppress(Exception):
            self._monitor.announce(failure)
        return True

    def complete_stop(self) -> None:
        """Complete the buckets in flight with the error of :meth:`begin_stop_for`."""
        self._stopping.complete()

    def join(self) -> None:
        """Wait for all buckets in flight, in the training thread, which receives Ctrl-C."""
        self.record.joined = threading.get_ident()
        try:
            self.record.wait_until_empty()
        except KeyboardInterrupt as error:
            self.stop("the end of backward", "waiting for the buckets", error)
            raise
        finally:
            self.record.joined = None

    def check(self) -> None:
        """Raise the error that has stopped the exchange, if any.

        Raises:
            EffAdamError: If the exchange has stopped.
        """
        self._stopping.check()

    def close(self) -> None:
        """End the threads. Ranks that wait for this one learn that it has ended."""
        is_first = self._stopping.begin_closing()
        self._monitor.wake()
        if is_first:
            self._stopping.close()
        # Also where the monitor has begun to close: the interpreter must not end before its thread.
        if self._monitor.join():
            _open_watchdogs.discard(self)


_open_watchdogs: weakref.WeakSet[Watchdog] = weakref.WeakSet()


def _describe_process() -> Process:
    return describe_process([watchdog.record for watchdog in list(_open_watchdogs)])


def _stop_models(found: Deadlock, process: Process, record: FlightRecord) -> None:
    """Stop the other models of this process that a deadlock concerns.

    A stuck thread runs none of its models, and other ranks may wait for any of them. All models are
    announced before the first one raises: this process may end then.

    Args:
        found: The deadlock.
        process: The waits of this process.
        record: The record of the model whose watchdog has found it.
    """
    stuck = {thread for (rank, thread), _ in found.waits if rank == process.rank}
    stopped = {run_id for run_id, run in process.runs.items() if set(run.threads) <= stuck}
    others = [
        watchdog
        for watchdog in list(_open_watchdogs)
        if watchdog.run_id in found.runs | stopped and watchdog.record is not record
    ]
    begun = [watchdog for watchdog in others if watchdog.begin_stop_for(found.error)]
    if begun:
        time.sleep(NOTICE_S)
    for watchdog in begun:
        watchdog.complete_stop()


def _sentence(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


@atexit.register
def _close_all() -> None:
    for watchdog in list(_open_watchdogs):
        watchdog.close()
