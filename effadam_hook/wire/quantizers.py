"""Quantizers: levels, the rule for the scale of a block, and the packing of codes.

A *block* of at most ``block_size`` neighbouring elements of one parameter shares one *scale*. Each
element is sent as a *code*, the index of a *level*, and is decoded as ``scale * level``. Levels are
fixed and symmetric about zero. Every level is a multiple of 2**-13 below 2**7, and scales are sent as
bfloat16, so that the product is exact in float32: decoding has the same result on every device.

A block is encoded in four steps:

[1] ``k`` is the exponent of the power of two below ``max|x|``, and ``y = x / 2**k``, which prevents
    overflow and underflow.
[2] A provisional scale ``p`` places the levels. It is derived from the root mean square of ``y``
    (``spread``) if the levels are made for a distribution, and from ``max|y|`` if they are made for a
    range.
[3] Each code is that of the level nearest to ``y / p``; ties go to the smaller magnitude.
[4] The final scale is the least-squares scale ``<y, q> / <q, q>``, for which the norm of the error does
    not exceed that of the block, whatever the codes; or ``max|y| / top level`` (absmax).

The codes of a block are packed in planes: code ``i`` of ``n`` belongs to plane ``i // P`` and
column ``i % P`` with ``P = ceil(n / planes)``. A column of eight ``b``-bit codes takes ``b`` bytes,
stored at a distance of ``P``; a column of five ternary codes takes one byte in base 3. With planes, one
vector instruction packs many codes without shuffling, on any device.

This module contains integers and floats only. The arithmetic on tensors is in
:mod:`effadam_hook.kernels`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

__all__ = ["QUANTIZERS", "SCALE_BYTES", "SCALE_RULES", "Quantizer", "get_quantizer"]

SCALE_BYTES = 2
"""Size of a scale in a payload: one bfloat16, which has the range of float32."""

_BFLOAT16_MAX = (2 - 2.0**-7) * 2.0**127

SCALE_RULES = ("least_squares", "absmax")
"""Rules for the final scale of a block."""


@dataclass(frozen=True)
class Quantizer:
    """Levels and their packing.

    Attributes:
        name: Public name.
        magnitudes: The non-negative levels, ascending. A leading 0 is common to both signs.
        planes: Number of codes in a column: 8, or 5 for ternary codes.
        plane_bytes: Size of a column in bytes.
        spread: Ratio of the provisional scale to the root mean square of the block. None if the
            provisional scale is the largest magnitude of the block divided by the top level.
    """

    name: str
    magnitudes: tuple[float, ...]
    planes: int
    plane_bytes: int
    spread: float | None

    @property
    def is_raw(self) -> bool:
        """Return whether values are sent unchanged, without codes and scales."""
        return not self.magnitudes

    @property
    def has_zero(self) -> bool:
        """Return whether zero is a level. Without it, zeros are sent as plus or minus one level."""
        return bool(self.magnitudes) and self.magnitudes[0] == 0.0

    @property
    def levels(self) -> tuple[float, ...]:
        """Return all levels, ascending. A code is an index of this tuple. Empty for ``none``."""
        positive = self.magnitudes[1:] if self.has_zero else self.magnitudes
        zero = (0.0,) if self.has_zero else ()
        return (*(-m for m in reversed(positive)), *zero, *positive)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Return the midpoints of neighbouring magnitudes; ties go to the smaller magnitude."""
        return tuple(
            (a + b) / 2 for a, b in zip(self.magnitudes, self.magnitudes[1:], strict=False)
        )

    @property
    def energy(self) -> float:
        """Return the part of the energy of a normal distribution that is transmitted, from 0 to 1.

        It is <x, q>² / (<x, x> <q, q>), for blocks of many elements, and 1 for ``none``. Without a
        spread, the largest magnitude of a block is taken as 2.8 standard deviations.
        """
        if self.is_raw:
            return 1.0
        spread = 2.8 / self.magnitudes[-1] if self.spread is None else self.spread
        edges = [0.0, *(spread * threshold for threshold in self.thresholds), math.inf]
        density = [math.exp(-edge * edge / 2) / math.sqrt(2 * math.pi) for edge in edges]
        tail = [math.erfc(edge / math.sqrt(2)) / 2 for edge in edges]
        cells = list(enumerate(self.magnitudes))
        product = 2 * sum(level * (density[k] - density[k + 1]) for k, level in cells)
        square = 2 * sum(level * level * (tail[k] - tail[k + 1]) for k, level in cells)
        return product * product / square

    @property
    def largest_scale(self) -> float:
        """Return the largest bfloat16 whose product with the top level is within bfloat16's range."""
        (bits,) = struct.unpack("<I", struct.pack("<f", _BFLOAT16_MAX / self.magnitudes[-1]))
        (scale,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))
        return float(scale)

    @property
    def bits(self) -> float:
        """Return the number of bits of a code, without scales."""
        return 32.0 if self.is_raw else 8 * self.plane_bytes / self.planes

    def code_bytes(self, numel: int) -> int:
        """Return the size of the codes of a block of ``numel`` elements in bytes."""
        return self.plane_bytes * math.ceil(numel / self.planes)

    def is_contraction(self, scale_rule: str) -> bool:
        """Return whether ``|x - decode(encode(x))| <= |x|`` holds for every block, up to rounding.

        It holds for every quantizer with the least-squares scale. With the absmax scale it requires a
        level at zero, so that no element changes by more than its own magnitude.
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
"""All quantizers by name."""


def get_quantizer(name: str) -> Quantizer:
    """Return a quantizer.

    Args:
        name: A key of :data:`QUANTIZERS`.

    Raises:
        ValueError: If no quantizer has this name.
    """
    try:
        return QUANTIZERS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"Invalid quantizer: {name!r}. Must be one of {', '.join(QUANTIZERS)}."
        ) from None
