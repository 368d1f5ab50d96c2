"""Does compression pay here? Some steps without it, some with it, and the faster route stays."""

from __future__ import annotations

import statistics

__all__ = ["AutoCompress", "check_auto"]

_SKIPPED, _TIMED = 3, 5
"""Steps of each kind: DDP rebuilds its buckets in the first ones, and buffers are allocated."""
_MARGIN = 0.97


def check_auto(enabled: bool, quantize_weights: bool) -> None:
    """Check that ``auto=True`` leaves something to decide.

    Args:
        enabled: As for :func:`effadam_hook.attach`.
        quantize_weights: The same.

    Raises:
        ValueError: If it does not.
    """
    if not enabled:
        raise ValueError("Invalid enabled: False with auto=True. Must be True: auto decides.")
    if quantize_weights:
        raise ValueError(
            "Invalid auto: True with quantize_weights=True. Must be False: the model's weights are the "
            "quantized ones from the first compressed step on, and dense steps could not take it back."
        )


class AutoCompress:
    """Decides between dense and compressed steps by their times.

    A step's time is that from its first bucket to the next step's first bucket: whatever a training
    loop does besides is in both, so that the difference is what counts.

    Attributes:
        pays: Whether compressed steps are faster; None until it is known.
        reason: The figures, for people; empty until they are known.
        is_over: Whether there is nothing more to find out.
    """

    def __init__(self) -> None:
        self.pays: bool | None = None
        self.reason = ""
        self.is_over = False
        self._starts_s: list[float] = []

    def begin_step(self, now_s: float) -> None:
        """Note that a step's first bucket is here.

        Args:
            now_s: The time, from any origin.
        """
        self._starts_s.append(now_s)

    @property
    def compresses(self) -> bool:
        """Whether the step that has begun is to be compressed."""
        return len(self._starts_s) > _SKIPPED + _TIMED

    @property
    def is_complete(self) -> bool:
        """Whether all steps have been timed, and it remains to decide."""
        return not self.is_over and len(self._starts_s) > 2 * (_SKIPPED + _TIMED)

    @property
    def verdict(self) -> str:
        """What was found, for people."""
        if self.pays is None:
            return "broken off, as enabled was set" if self.is_over else "being tried out"
        return f"{'compressed' if self.pays else 'dense'}: {self.reason}"

    def break_off(self) -> None:
        """Find out nothing more, because the user has decided."""
        self.is_over = True

    def medians_s(self) -> tuple[float, float]:
        """Median seconds of this rank's timed steps, dense and compressed."""
        steps = [b - a for a, b in zip(self._starts_s, self._starts_s[1:], strict=False)]
        half = _SKIPPED + _TIMED
        return (
            statistics.median(steps[_SKIPPED:half]),
            statistics.median(steps[half + _SKIPPED : 2 * half]),
        )

    def decide(self, dense_s: float, compressed_s: float) -> None:
        """Choose the faster route.

        Args:
            dense_s: Seconds of a dense step on the slowest rank.
            compressed_s: Seconds of a compressed step on the slowest rank.
        """
        self.is_over = True
        self.pays = compressed_s < _MARGIN * dense_s
        self.reason = (
            f"a step takes {1e3 * dense_s:.1f} ms dense, {1e3 * compressed_s:.1f} ms compressed "
            f"(medians of {_TIMED} steps, slowest rank)"
        )
