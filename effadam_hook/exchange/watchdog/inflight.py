"""A bucket in flight, and a wait for all ranks outside a bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import wait_while

__all__ = ["CONNECTING", "Hold", "InflightBucket"]

CONNECTING = "connecting"
"""The phase of a hold in which Gloo connects the ranks; all of them have reached it."""


@dataclass
class Hold:
    """A wait for all ranks outside a bucket, such as opening the exchange.

    Attributes:
        number: Number of holds that this rank started before.
        sequence: Number of buckets that this rank started before.
        label: Name in messages.
        phase: The current operation, for messages.
        thread: Identifier of the waiting thread.
        since: Time of the start, by :func:`time.monotonic`.
    """

    number: int
    sequence: int
    label: str
    phase: str
    thread: int = field(default_factory=threading.get_ident)
    since: float = field(default_factory=time.monotonic)

    @property
    def doing(self) -> str:
        """The predicate of a sentence whose subject is the rank."""
        return f"is {'in ' if self.label.endswith('()') else ''}{self.label}"


class InflightBucket:
    """One bucket, or part of one, between the hook and the completion of its future.

    Args:
        sequence: See below.
        label: See below.
        phase: See below.
        future: See below.
        bucket: See below.
        in_backward: Whether the training thread raises errors itself at the end of the backward.
        is_useful: Returns whether the exchange still runs, so that waiting is useful.
        on_end: Called once, with this bucket, when the future has been completed.

    Attributes:
        sequence: Sequence number: the number of buckets that this rank started before.
        label: Name of the bucket in messages.
        phase: The current operation, for messages.
        future: Completes once, with the bucket or with an error.
        bucket: DDP's buffer, the result of the future.
        work: The collective in progress, if any.
        since: Time of the start, by :func:`time.monotonic`.
    """

    def __init__(
        self,
        sequence: int,
        label: str,
        phase: str,
        future: Future[Tensor],
        bucket: Tensor,
        in_backward: bool,
        is_useful: Callable[[], bool],
        on_end: Callable[[InflightBucket], None],
    ) -> None:
        self.sequence = sequence
        self.label = label
        self.phase = phase
        self.future = future
        self.work: dist.Work | None = None
        self.since = time.monotonic()
        self.bucket = bucket
        self._in_backward = in_backward
        self._is_useful = is_useful
        self._on_end = on_end
        self._ended = threading.Lock()

    def wait(self) -> None:
        """Wait for the collective in progress, unless the exchange stops.

        Raises:
            EffAdamError: If the exchange has stopped meanwhile.
            RuntimeError: If the collective has failed.
        """
        if self.work is not None and not wait_while(self.work, self._is_useful):
            raise EffAdamError("the exchange has stopped.")

    @property
    def is_over(self) -> bool:
        """Return whether the future is complete."""
        return self._ended.locked()

    def succeed(self) -> None:
        """Complete the future with the bucket, unless it is complete."""
        if self._end():
            self.future.set_result(self.bucket)
            self._on_end(self)

    def fail(self, error: EffAdamError) -> None:
        """Complete the future with an error, unless it is complete.

        An error in a future makes DDP raise a RuntimeError about its type in the middle of its own
        bookkeeping, and leaves the model unusable. Within a backward the future therefore gets the
        bucket as it is, and the training thread raises the error after DDP has finished.

        Args:
            error: The error.
        """
        if not self._end():
            return
        if self._in_backward:
            self.future.set_result(self.bucket)
        else:
            self.future.set_exception(error)  # type: ignore[arg-type]
        self._on_end(self)

    def _end(self) -> bool:
        return self._ended.acquire(blocking=False)
