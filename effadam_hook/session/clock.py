"""Duration of an exchange."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.futures import Future

__all__ = ["Clock"]


class Clock:
    """Time an exchange, from the arrival of its first bucket to the decoding of its last one.

    Timing never blocks the host: on CUDA, events are recorded, and read when :attr:`seconds` is.
    """

    def __init__(self) -> None:
        self._begin_s = 0.0
        self._begin: torch.cuda.Event | None = None
        self._last: float | tuple[torch.cuda.Event, torch.cuda.Event] = 0.0

    def start(self, device: torch.device) -> None:
        """Note the arrival of the first bucket of a backward."""
        self._begin_s = time.perf_counter()
        self._begin = _event() if device.type == "cuda" else None

    def stop_after(self, last: Future[Tensor]) -> None:
        """Note the time when a future completes; the exchange completes futures in order."""
        begin_s, begin = self._begin_s, self._begin

        def note(_: Future[Tensor]) -> None:
            # For a future on CUDA, torch runs this on a stream that comes after the future's.
            self._last = (begin, _event()) if begin else time.perf_counter() - begin_s

        last.add_done_callback(note)

    @property
    def seconds(self) -> float:
        """Return the duration of the last exchange, 0 before the first. Waits for the device."""
        if isinstance(self._last, float):
            return self._last
        begin, end = self._last
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
