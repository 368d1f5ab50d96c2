"""Counters of steps and of payload bytes. Integers only, no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

__all__ = ["COUNTER_NAMES", "Counters", "human_bytes"]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass
class Counters:
    """Bytes that this rank has sent and received, as payloads.

    The unit is a payload: the bytes that one worker sends to its servers, with all chunks and padding,
    and the bytes that it gets back. Payloads do not depend on the topology; the number of times that a
    payload crosses a link does.

    Attributes:
        steps: Backward passes with communication, dense ones included.
        dense_bytes: Bytes of uncompressed gradients, both directions together.
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
            dense_bytes: Bytes of the uncompressed bucket, in one direction.
            uplink_bytes: Bytes of the uplink's payload.
            downlink_bytes: Bytes of the downlink's payload.
        """
        self.dense_bytes += 2 * dense_bytes
        self.uplink_bytes += uplink_bytes
        self.downlink_bytes += downlink_bytes

    @property
    def ratio(self) -> float:
        """Return dense bytes divided by sent bytes; 1.0 before the first bucket."""
        sent = self.uplink_bytes + self.downlink_bytes
        return self.dense_bytes / sent if sent else 1.0

    def to_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)


COUNTER_NAMES = frozenset(field.name for field in fields(Counters))
"""Names of the counters."""


def human_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a decimal unit, such as ``1.50 GB``."""
    power = min(int(math.log10(count)) // 3, len(_UNITS) - 1) if count >= 1 else 0
    if round(count / 1000**power, 0) >= 1000 and power + 1 < len(_UNITS):
        power += 1
    value = count / 1000**power
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(value) + 1e-3))
    return f"{value:.{digits}f} {_UNITS[power]}"
