"""Bytes exchanged, counted in integers that the layout gives, and the time that an exchange took."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.futures import Future

__all__ = ["Clock", "Counters"]


@dataclass
class Counters:
    """Count the payload bytes that this rank has sent and received.

    The unit is a payload: what one worker hands to its servers, all chunks and padding included, and
    what it gets back. It does not depend on the topology; how often a payload crosses which link does.

    Attributes:
        steps: Backward passes with communication, dense ones included.
        dense_bytes: What uncompressed gradients would have taken, both ways together.
        uplink_bytes: Bytes from this worker to the servers.
        downlink_bytes: Bytes from the servers to this worker.
    """

    steps: int = 0
    dense_bytes: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0

    def count(self, dense_bytes: int, uplink_bytes: int, downlink_bytes: int) -> None:
        """Add one bucket.

        Args:
            dense_bytes: Its bytes uncompressed, one way.
            uplink_bytes: Its uplink payload.
            downlink_bytes: Its downlink payload.
        """
        self.dense_bytes += 2 * dense_bytes
        self.uplink_bytes += uplink_bytes
        self.downlink_bytes += downlink_bytes

    @property
    def ratio(self) -> float:
        """Return the bytes of uncompressed gradients over those sent; 1.0 before the first step."""
        sent = self.uplink_bytes + self.downlink_bytes
        return self.dense_bytes / sent if sent else 1.0

    def to_dict(self) -> dict[str, int]:
        """Plain integers, for saved states."""
        return asdict(self)


class Clock:
    """Times an exchange, from its first bucket's arrival to its last one's decoding.

    Nothing waits for it: on CUDA the times are those of events, looked at when someone asks.
    """

    def __init__(self) -> None:
        self._begin_s = 0.0
        self._begin: torch.cuda.Event | None = None
        self._last: float | tuple[torch.cuda.Event, torch.cuda.Event] = 0.0

    def start(self, device: torch.device) -> None:
        """A backward's first bucket is here."""
        self._begin_s = time.perf_counter()
        self._begin = _event() if device.type == "cuda" else None

    def stop_after(self, last: Future[Tensor]) -> None:
        """Note the time when a future completes; the exchange completes them in order."""
        begin_s, begin = self._begin_s, self._begin

        def note(_: Future[Tensor]) -> None:
            # For a future on CUDA, torch runs this on a stream that comes after the future's.
            self._last = (begin, _event()) if begin else time.perf_counter() - begin_s

        last.add_done_callback(note)

    @property
    def seconds(self) -> float:
        """Return the seconds of the last exchange; 0 before the first. Waits for the device."""
        if isinstance(self._last, float):
            return self._last
        begin, end = self._last
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
