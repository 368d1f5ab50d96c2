"""The choice between dense and compressed steps for ``auto=True``, from the times of a few of each."""

from __future__ import annotations

import statistics

__all__ = ["AutoCompress", "check_auto"]

_SKIPPED, _TIMED = 3, 5
"""Steps of each kind; in the first ones DDP rebuilds its buckets, and buffers are allocated."""
_MARGIN = 0.97


def check_auto(enabled: bool, quantize_weights: bool) -> None:
    """Check that ``auto=True`` fits the other options.

    Args:
        enabled: The option of :func:`effadam_hook.attach`.
        quantize_weights: The option of :func:`effadam_hook.attach`.

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
    """The decision between dense and compressed steps by their times.

    The time of a step reaches from its first bucket to the first bucket of the next step. Other
    work of the training loop is part of both kinds, and cancels in the comparison.

    Attributes:
        pays: Whether compressed steps are faster; None before the decision.
        reason: The times, for people; empty before the decision.
        is_over: Whether the measurement has ended.
    """

    def __init__(self) -> None:
        self.pays: bool | None = None
        self.reason = ""
        self.is_over = False
        self._starts_s: list[float] = []

    def begin_step(self, now_s: float) -> None:
        """Record the start of a step, at its first bucket.

        Args:
            now_s: The time in seconds, from any origin.
        """
        self._starts_s.append(now_s)

    @property
    def compresses(self) -> bool:
        """Return whether the current step is compressed."""
        return len(self._starts_s) > _SKIPPED + _TIMED

    @property
    def is_complete(self) -> bool:
        """Return whether all steps have been timed, so that :meth:`decide` can be called."""
        return not self.is_over and len(self._starts_s) > 2 * (_SKIPPED + _TIMED)

    @property
    def outcome(self) -> str:
        """The state of the measurement, for people."""
        if self.pays is None:
            return (
                "ended without a decision, as enabled was set" if self.is_over else "being measured"
            )
        return f"{'compressed' if self.pays else 'dense'}: {self.reason}"

    def break_off(self) -> None:
        """End the measurement without a decision, because the user has set ``enabled``."""
        self.is_over = True

    def medians_s(self) -> tuple[float, float]:
        """Return the median seconds of this rank's timed steps, dense and compressed."""
        steps = [b - a for a, b in zip(self._starts_s, self._starts_s[1:], strict=False)]
        half = _SKIPPED + _TIMED
        return (
            statistics.median(steps[_SKIPPED:half]),
            statistics.median(steps[half + _SKIPPED : 2 * half]),
        )

    def decide(self, dense_s: float, compressed_s: float) -> None:
        """Choose the faster kind of step.

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
