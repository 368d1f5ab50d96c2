"""One collective of an exchange, as the link of the busiest rank carries it. Numbers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Leg"]


@dataclass(frozen=True)
class Leg:
    """One collective, as the link of the busiest rank carries it.

    Attributes:
        name: The key of the leg in :attr:`Link.slowdown <effadam_hook.planner.predict.Link.slowdown>` and
            in the probe's legs.
        out_bytes: Payload bytes that leave that rank.
        in_bytes: Payload bytes that arrive there.
        rounds: Messages that must follow one another.
        messages: Messages that the busiest rank sends or receives besides, at once.
    """

    name: str
    out_bytes: float
    in_bytes: float
    rounds: int
    messages: int = 0

    @property
    def busiest_bytes(self) -> float:
        """Bytes in the busier direction."""
        return max(self.out_bytes, self.in_bytes)
