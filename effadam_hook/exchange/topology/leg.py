"""One collective of an exchange, as the link of the busiest rank carries it: numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Leg"]


@dataclass(frozen=True)
class Leg:
    """One collective, as the link of the busiest rank carries it.

    Attributes:
        name: Key of the leg in the probe, and in the slowdowns of the planner's link.
        out_bytes: Payload bytes that leave that rank.
        in_bytes: Payload bytes that arrive there.
        rounds: Number of messages that must follow one another.
        messages: Number of further messages that the busiest rank sends or receives at the same
            time.
    """

    name: str
    out_bytes: float
    in_bytes: float
    rounds: int
    messages: int = 0

    @property
    def busiest_bytes(self) -> float:
        """Payload bytes in the busier direction."""
        return max(self.out_bytes, self.in_bytes)
