"""Counters of what has travelled: plain integers, known from the layout, no look at any device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Counters"]


@dataclass
class Counters:
    """What this rank has sent and received, as payload bytes.

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
        """How many times less than uncompressed gradients has travelled; 1.0 before the first."""
        sent = self.uplink_bytes + self.downlink_bytes
        return self.dense_bytes / sent if sent else 1.0

    def to_dict(self) -> dict[str, int]:
        """Plain integers, for saved states."""
        return asdict(self)
