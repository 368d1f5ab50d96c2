"""The stop of an exchange: its first reason counts, and every bucket in flight gets it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.watchdog.flight_record import FlightRecord

__all__ = ["ANSWER_S", "END_S", "NOTICE_S", "Stopping"]

ANSWER_S = 2.5
"""Seconds that a failing rank waits for the positions of the others before it raises."""
NOTICE_S = 1.2
"""Seconds that a rank leaves the others to read its diagnosis: two of their ticks."""
END_S = 5.0
"""Seconds to wait for the end of a thread, milliseconds on a machine that is not overloaded."""


class Stopping:
    """The stop of one rank's exchange, after an error or at the end of training.

    An exchange that an error has stopped never goes on: its groups may contain collectives that
    never end.

    Args:
        record: The buckets in flight.

    Attributes:
        failure: The error that has stopped the exchange; None while it runs.
        reported: The error that this rank reports to the others; None where another rank found it.
        is_cause: Whether :attr:`reported` is more than the loss of a connection, which follows from
            an error of another rank.
        is_closing: Whether training is over.
    """

    def __init__(self, record: FlightRecord) -> None:
        self.failure: EffAdamError | None = None
        self.reported: EffAdamError | None = None
        self.is_cause = False
        self.is_closing = False
        self._record = record
        self._refusal: EffAdamError | None = None
        self._on_failure: list[Callable[[], None]] = []
        self._on_close: list[Callable[[], None]] = []
        self._beginning = threading.Lock()
        self._complete = threading.Event()
        self._closing = threading.Lock()

    @property
    def is_running(self) -> bool:
        """Return whether the exchange runs, so that waiting for other ranks is useful."""
        return self.failure is None and not self.is_closing

    def on_failure(self, action: Callable[[], None]) -> None:
        """Register an action for a stop with buckets in flight."""
        self._on_failure.append(action)

    def on_close(self, action: Callable[[], None]) -> None:
        """Register an action for the end of training."""
        self._on_close.append(action)

    def begin(self, failure: EffAdamError) -> bool:
        """Stop the exchange, unless it has stopped.

        Args:
            failure: The error.

        Returns:
            Whether this is the first error; whoever passes it must call :meth:`complete`.
        """
        with self._beginning:
            if self.failure is not None:
                return False
            self.failure = failure
            return True

    def report(self, failure: EffAdamError, is_cause: bool) -> None:
        """Set the error that this rank reports to the others."""
        self.reported, self.is_cause = failure, is_cause

    def extend(self, failure: EffAdamError) -> None:
        """Replace the error by one that says more."""
        self.failure = self.reported = failure

    def complete(self) -> None:
        """Run the actions for a failure, and complete the buckets in flight with the error."""
        assert self.failure is not None
        _run_actions(self._on_failure)
        for inflight in list(self._record.in_flight.values()):
            inflight.fail(self.failure)
        self._complete.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until the stop is complete, or for that many seconds."""
        self._complete.wait(timeout_s)

    def refuse(self, where: str) -> EffAdamError:
        """Return the error for a bucket that comes after the stop.

        Args:
            where: The rank and the bucket.
        """
        if self.failure is not None:
            self.wait(2 * ANSWER_S)
        reason = self.failure or "it was closed."
        kind = EffAdamError if self.failure is None else type(self.failure)
        self._refusal = self._refusal or kind(
            f"{where}: not started, the exchange has stopped: {reason} Restart all ranks from a "
            "checkpoint."
        )
        return self._refusal

    def check(self) -> None:
        """Raise the error that has stopped the exchange, if any.

        Raises:
            EffAdamError: If the exchange has stopped.
        """
        error = self._refusal or self.failure
        if error is not None:
            raise error

    def begin_closing(self) -> bool:
        """Mark the end of training, and return whether this is the first call."""
        with self._closing:
            is_first, self.is_closing = not self.is_closing, True
        return is_first

    def close(self) -> None:
        """Run the actions for the end of training."""
        if self._record.in_flight:
            _run_actions(self._on_failure)
        _run_actions(self._on_close)


def _run_actions(actions: list[Callable[[], None]]) -> None:
    # A failing worker thread and a closing thread may both be here; each action runs once.
    while True:
        try:
            action = actions.pop()
        except IndexError:
            return
        action()
