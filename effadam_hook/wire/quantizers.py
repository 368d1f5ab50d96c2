"""What a quantizer is: its levels, how a block finds its scale, and the bytes its codes take.

A *block* of at most ``block_size`` neighbouring elements of one parameter shares one *scale*. Each
element is sent as a *code*, the index of a *level*, and is decoded as ``scale * level``. Levels are
fixed and symmetric about zero, and every one is a multiple of 2**-13 below 2**7, so that the product
with a scale, which travels as bfloat16, is exact in float32: decoding has one possible outcome on
every device.

From a block to its codes, in order:

[1] ``k`` is the power of two below ``max|x|``, and ``y = x / 2**k``: nothing can over- or underflow.
[2] A provisional scale ``p`` places the levels: from the root mean square of ``y`` (``spread``) where
    the levels were made for a distribution, from ``max|y|`` where they were made for a range.
[3] Each code is the level nearest to ``y / p``; a tie goes to the smaller magnitude.
[4] The final scale is the least-squares one, ``<y, q> / <q, q>``, with which no choice of codes can
    increase the norm of the error beyond that of the block itself; or ``max|y| / top level``.

The codes of a block are packed in planes: code ``i`` of ``n`` belongs to plane ``i // P`` and
column ``i % P`` with ``P = ceil(n / planes)``. A column of eight ``b``-bit codes makes ``b`` bytes,
stored ``P`` apart; a column of five ternary codes makes one byte in base 3. Planes let one vector
instruction pack many codes on any device without shuffling.

This module is integers and floats only; the arithmetic on tensors is in :mod:`effadam_hook.kernels`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

__all__ = ["QUANTIZERS", "SCALE_BYTES", "SCALE_RULES", "Quantizer", "get_quantizer"]

SCALE_BYTES = 2
"""Bytes of a scale on the wire: one bfloat16, which has the range of float32."""

_BFLOAT16_MAX = (2 - 2.0**-7) * 2.0**127

SCALE_RULES = ("least_squares", "absmax")
"""How the final scale of a block is found."""


@dataclass(frozen=True)
class Quantizer:
    """A family of levels and its packing.

    Attributes:
        name: The public name.
        magnitudes: The levels that are not negative, ascending. A leading 0 is shared by both signs.
        planes: Codes packed together into one column: 8, or 5 for ternary codes.
        plane_bytes: Bytes that a column takes.
        spread: The provisional scale over the root mean square of the block, or None when the
            provisional scale is the block's largest magnitude over the top level.
    """

    name: str
    magnitudes: tuple[float, ...]
    planes: int
    plane_bytes: int
    spread: float | None

    @property
    def is_raw(self) -> bool:
        """Whether values travel as they are, without codes or scales."""
        return not self.magnitudes

    @property
    def has_zero(self) -> bool:
        """Whether zero is a level. Without it, an element that is always zero sends ± one level."""
        return bool(self.magnitudes) and self.magnitudes[0] == 0.0

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels, ascending: a code is an index into them. Empty for ``none``."""
        positive = self.magnitudes[1:] if self.has_zero else self.magnitudes
        zero = (0.0,) if self.has_zero else ()
        return (*(-m for m in reversed(positive)), *zero, *positive)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Midpoints of neighbouring magnitudes; a ratio on one takes the smaller magnitude."""
        return tuple(
            (a + b) / 2 for a, b in zip(self.magnitudes, self.magnitudes[1:], strict=False)
        )

    @property
    def largest_scale(self) -> float:
        """The largest bfloat16 whose product with the top level is finite in bfloat16, unrounded."""
        (bits,) = struct.unpack("<I", struct.pack("<f", _BFLOAT16_MAX / self.magnitudes[-1]))
        (scale,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))
        return float(scale)

    @property
    def bits(self) -> float:
        """Bits of one code on the wire, scales apart."""
        return 32.0 if self.is_raw else 8 * self.plane_bytes / self.planes

    def code_bytes(self, numel: int) -> int:
        """Bytes that the codes of one block of ``numel`` elements take."""
        return self.plane_bytes * math.ceil(numel / self.planes)

    def is_contraction(self, scale_rule: str) -> bool:
        """Whether ``|x - decode(encode(x))| <= |x|`` holds for every block, up to rounding.

        True of every quantizer with the least-squares scale. With the absmax scale it needs a level
        at zero, so that no element moves by more than its own magnitude.
        """
        return self.is_raw or scale_rule == "least_squares" or self.has_zero


def _lloyd(*numerators: int) -> tuple[float, ...]:
    return tuple(n / 8192 for n in numerators)


_FAMILY = (
    Quantizer("uniform8", tuple(float(i) for i in range(128)), 8, 8, None),
    Quantizer("uniform4", tuple(float(i) for i in range(8)), 8, 4, None),
    Quantizer("uniform3", tuple(float(i) for i in range(4)), 8, 3, None),
    Quantizer("log4", (0.0, *(2.0**-k for k in range(6, -1, -1))), 8, 4, None),
    Quantizer("log3", (0.0, 0.25, 0.5, 1.0), 8, 3, None),
    # Lloyd-Max levels of the unit normal distribution, rounded to 2**-13.
    Quantizer("lloyd4", _lloyd(1052, 3179, 5380, 7720, 10291, 13255, 16949, 22385), 8, 4, 1.0),
    Quantizer("lloyd3", _lloyd(2008, 6193, 11009, 17629), 8, 3, 1.0),
    Quantizer("lloyd2", _lloyd(3709, 12373), 8, 2, 1.0),
    # The three Lloyd-Max levels of the normal distribution are 0 and ±1.224 standard deviations.
    Quantizer("ternary", (0.0, 1.0), 5, 1, 1.224),
    Quantizer("sign", (1.0,), 8, 1, 1.0),
    Quantizer("none", (), 1, 0, None),
)

QUANTIZERS: dict[str, Quantizer] = {quantizer.name: quantizer for quantizer in _FAMILY}
"""Every quantizer by its public name."""


def get_quantizer(name: str) -> Quantizer:
    """Look up a quantizer.

    Args:
        name: One of :data:`QUANTIZERS`.

    Returns:
        The quantizer of that name.

    Raises:
        ValueError: If there is none of that name.
    """
    try:
        return QUANTIZERS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"Invalid quantizer: {name!r}. Must be one of {', '.join(QUANTIZERS)}."
        ) from None
