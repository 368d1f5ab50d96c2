"""One bucket's route from the hook to its future: where it is, and how it ends, once."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import wait_while

__all__ = ["Hold", "InflightBucket"]


class Overseer(Protocol):
    """Who keeps the list of inflight_buckets: :class:`~effadam_hook.exchange.watchdog.watchdog.Watchdog`."""

    def is_going_on(self) -> bool:
        """Whether there is any use in waiting."""
        ...

    def finished(self, inflight: InflightBucket) -> None:
        """Note that a bucket has arrived, or failed."""
        ...


@dataclass
class Hold:
    """A wait for all ranks outside a bucket, such as opening the exchange.

    Attributes:
        number: How many of them this rank started before it.
        sequence: How many buckets this rank started before it.
        label: How messages name it.
        phase: What is being done, or waited for.
        thread: Which thread waits.
        since: When it began, by :func:`time.monotonic`.
    """

    number: int
    sequence: int
    label: str
    phase: str
    thread: int = field(default_factory=threading.get_ident)
    since: float = field(default_factory=time.monotonic)

    @property
    def doing(self) -> str:
        """The same, for a sentence that begins with the rank."""
        return f"is {'in ' if self.label.endswith('()') else ''}{self.label}"


class InflightBucket:
    """One bucket, or part of one, on its route from the hook to its future.

    Attributes:
        sequence: How many buckets this rank started before it.
        label: How messages name the bucket.
        phase: What is being done, or waited for.
        future: Completes once, with the bucket or with what went wrong.
        work: The collective under way, if any.
        since: When it set out, by :func:`time.monotonic`.
    """

    def __init__(
        self,
        watchdog: Overseer,
        sequence: int,
        label: str,
        phase: str,
        future: Future[Tensor],
        bucket: Tensor,
        in_backward: bool,
    ) -> None:
        self._bucket = bucket
        self._in_backward = in_backward
        self.sequence = sequence
        self.label = label
        self.phase = phase
        self.future = future
        self.work: dist.Work | None = None
        self.since = time.monotonic()
        self._watchdog = watchdog
        self._open = threading.Lock()

    def wait(self) -> None:
        """Wait for the collective under way, unless the exchange stops.

        Raises:
            EffAdamError: If the exchange has stopped meanwhile.
            RuntimeError: If the collective has failed.
        """
        if self.work is not None and not wait_while(self.work, self._watchdog.is_going_on):
            raise EffAdamError("the exchange has stopped.")

    @property
    def is_over(self) -> bool:
        """Whether the future is complete."""
        return self._open.locked()

    def succeed(self) -> None:
        """Complete the future, unless it has failed meanwhile."""
        if self._finish():
            self.future.set_result(self._bucket)
            self._watchdog.finished(self)

    def fail(self, error: EffAdamError) -> None:
        """Complete the future with an error, unless it is complete.

        Within a backward, the training thread raises the error when DDP has put its books in order.
        DDP would do so halfway, as a RuntimeError that complains of a type, and be unusable then. So
        it gets the bucket, whatever is in it.
        """
        if not self._finish():
            return
        if self._in_backward:
            self.future.set_result(self._bucket)
        else:
            self.future.set_exception(error)  # type: ignore[arg-type]
        self._watchdog.finished(self)

    def _finish(self) -> bool:
        return self._open.acquire(blocking=False)
