"""Tables of levels for the fused kernels."""

from __future__ import annotations

from effadam_hook.wire.quantizers import Quantizer

__all__ = ["TABLE_CODES", "TABLE_THRESHOLDS", "is_linear", "level_table"]

TABLE_CODES = 16
"""Entries of the table in which fused kernels look up a level by its code."""

TABLE_THRESHOLDS = 8
"""Entries of the table of the thresholds between magnitudes."""


def is_linear(quantizer: Quantizer) -> bool:
    """Return whether the magnitudes are 0, 1, 2 and so on, so that levels need no table.

    Args:
        quantizer: Any.

    Returns:
        True if a level is its code minus a constant. True for raw elements, which have no levels.
    """
    return quantizer.magnitudes == tuple(range(len(quantizer.magnitudes)))


def level_table(quantizer: Quantizer) -> tuple[float, ...]:
    """Return the levels by code, for kernels that look them up.

    Args:
        quantizer: Any.

    Returns:
        At most :data:`TABLE_CODES` levels; none for raw elements and for more linear levels than that,
        which the kernels compute from the code.

    Raises:
        ValueError: If there are more levels, and they are not linear.
    """
    levels = quantizer.levels
    if is_linear(quantizer):
        return levels if len(levels) <= TABLE_CODES else ()
    if len(levels) > TABLE_CODES:
        raise ValueError(
            f"Invalid quantizer {quantizer.name!r}: it has {len(levels)} levels. Must be at most "
            f"{TABLE_CODES} for the fused kernels, unless its magnitudes are 0, 1, 2 and so on. Set "
            "EFFADAM_KERNELS=reference, which takes any number."
        )
    return levels
