"""Levels of the Triton kernels: selected among constants, or computed from the code.

The magnitudes of a quantizer are one integer that is known when a kernel is compiled, with 16 bits for
each, in units of 2**-14. Tables in memory are not needed: four magnitudes are a 64-bit constant, and
one shift selects among them.
"""

import triton
import triton.language as tl

from effadam_hook.kernels.levels import is_linear, level_table
from effadam_hook.wire.quantizers import Quantizer

__all__ = ["level_of", "nearest", "packed_magnitudes"]

_UNIT = 2**14
_BITS = 16


def packed_magnitudes(quantizer: Quantizer) -> int:
    """Return the magnitudes as one integer, for kernels that select among them.

    Args:
        quantizer: Any.

    Returns:
        16 bits for each magnitude, the first one lowest; 0 for more than two linear levels, which are
        computed, and for raw elements.

    Raises:
        ValueError: If there are too many levels for the fused kernels, or too large ones.
    """
    if is_linear(quantizer) and len(quantizer.magnitudes) != 2:
        return 0
    level_table(quantizer)
    units = [int(magnitude * _UNIT) for magnitude in quantizer.magnitudes]
    if max(units) >= 1 << _BITS:
        raise ValueError(
            f"Invalid quantizer {quantizer.name!r}: its top level is {quantizer.magnitudes[-1]}. "
            "Must be below 4 for the Triton kernels, unless its magnitudes are 0, 1, 2 and so on. Set "
            "EFFADAM_KERNELS=reference, which takes any."
        )
    return sum(unit << _BITS * i for i, unit in enumerate(units))


@triton.jit
def _signed(value, negative):
    return tl.where(negative, -value, value)


@triton.jit
def _magnitude_of(twice, LEVELS: tl.constexpr, MAGNITUDES: tl.constexpr):
    """Return the float32 magnitudes at indices, given ``2 * index`` of which bits 1 to 3 are read."""
    if MAGNITUDES == 1:
        magnitude = tl.full(twice.shape, (LEVELS & 0xFFFF) / 16384, tl.float32)
    elif MAGNITUDES == 2:
        first = tl.full((), (LEVELS & 0xFFFF) / 16384, tl.float32)
        magnitude = tl.where((twice & 2) != 0, (LEVELS >> 16) / 16384, first)
    else:
        if MAGNITUDES <= 4:
            shift = ((twice << 3) & 48).to(tl.uint64)
            units = (tl.full((), LEVELS, tl.uint64) >> shift).to(tl.uint32)
        else:
            # Even indices are one 64-bit constant, and the steps to the odd ones, halved, another.
            # Their sum takes no predicate: ptxas packs many of those into registers, and unpacks them.
            even: tl.constexpr = (
                (LEVELS & 0xFFFF)
                | ((LEVELS >> 32 & 0xFFFF) << 16)
                | ((LEVELS >> 64 & 0xFFFF) << 32)
                | ((LEVELS >> 96 & 0xFFFF) << 48)
            )
            odd: tl.constexpr = (
                (LEVELS >> 16 & 0xFFFF)
                | ((LEVELS >> 48 & 0xFFFF) << 16)
                | ((LEVELS >> 80 & 0xFFFF) << 32)
                | ((LEVELS >> 112 & 0xFFFF) << 48)
            )
            shift = ((twice << 2) & 48).to(tl.uint64)
            half_steps = (tl.full((), (odd - even) >> 1, tl.uint64) >> shift).to(tl.uint32)
            units = (tl.full((), even, tl.uint64) >> shift).to(tl.uint32)
            units = units + (twice & 2).to(tl.uint32) * half_steps
        # The float32 with these bits is 2**9 plus the magnitude.
        bits = (units & 0xFFFF) | 0x44000000
        magnitude = bits.to(tl.float32, bitcast=True) - 512.0
    return magnitude


@triton.jit
def level_of(code, LEVELS: tl.constexpr, MAGNITUDES: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Return the float32 levels of int32 codes."""
    # The magnitudes 0 and 1 are linear, and those of "log4" and "log3" double from the second one on.
    linear: tl.constexpr = LEVELS == 0 or LEVELS == 16384 << 16
    doubling: tl.constexpr = (
        (HAS_ZERO and MAGNITUDES > 2) and LEVELS >> (16 * MAGNITUDES - 16) == 16384
    ) and LEVELS >> 32 == (LEVELS & ((1 << (16 * MAGNITUDES - 16)) - 1)) >> 15
    if linear:
        level = (code - (MAGNITUDES - 1)).to(tl.float32)
    elif doubling:
        # As an exponent, the index 0 is the number 0.
        centred = code - (MAGNITUDES - 1)
        bits = (tl.abs(centred) << 23) | (centred & tl.full((), -0x80000000, tl.int32))
        level = bits.to(tl.float32, bitcast=True) * (2.0 ** (128 - MAGNITUDES))
    else:
        centred = code - (MAGNITUDES - HAS_ZERO)
        if HAS_ZERO:
            index = tl.abs(centred)
        else:
            index = centred ^ (centred >> 31)
        level = _signed(_magnitude_of(2 * index, LEVELS, MAGNITUDES), centred < 0)
    return level


@triton.jit
def levels_of_word(word, plane, LEVELS: tl.constexpr, MAGNITUDES: tl.constexpr, BITS: tl.constexpr):
    """Return the float32 levels of all planes of a column of ``BITS``-bit codes without a zero.

    The highest bit of a code is its sign. In a negative code the others are inverted; they are inverted
    back for the whole column at once.
    """
    ones: tl.constexpr = ((1 << (8 * BITS)) - 1) // ((1 << BITS) - 1)
    negative = ~(word >> (BITS - 1)) & ones
    word = word ^ (negative * ((1 << (BITS - 1)) - 1))
    magnitude = _magnitude_of(
        (word << 1).to(tl.uint32, bitcast=True) >> (BITS * plane).to(tl.uint32), LEVELS, MAGNITUDES
    )
    sign = (~word << ((32 - BITS) - BITS * plane)) & tl.full((), -0x80000000, tl.int32)
    return (magnitude.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def nearest(
    ratio, negative, LEVELS: tl.constexpr, MAGNITUDES: tl.constexpr, HAS_ZERO: tl.constexpr
):
    """Return the int32 codes and the float32 levels nearest to ``ratio`` with the sign of ``negative``.

    Ties go to the smaller magnitude. Above each threshold the next magnitude is selected. Its last bits
    hold its index, as a magnitude needs at most 16 of the 24 bits of a float32.
    """
    if LEVELS == 0:
        index = tl.minimum(tl.ceil(ratio - 0.5), MAGNITUDES - 1.0).to(tl.int32)
        magnitude = index.to(tl.float32)
    else:
        magnitude = tl.full(ratio.shape, (LEVELS & 0xFFFF) / 16384, tl.float32)
        both = magnitude.to(tl.int32, bitcast=True)
        for t in tl.static_range(MAGNITUDES - 1):
            below = (LEVELS >> (16 * t)) & 0xFFFF
            above = (LEVELS >> (16 * t + 16)) & 0xFFFF
            larger = tl.full((), above / 16384, tl.float32).to(tl.int32, bitcast=True) | (t + 1)
            both = tl.where(ratio > (below + above) / 32768, larger, both)
        index = both & 7
        magnitude = (both & -8).to(tl.float32, bitcast=True)
    # All bits of a negative element's mask are set. A mask takes no predicate register.
    mask = tl.where(negative, -1, 0)
    code = MAGNITUDES + (index ^ mask)
    if HAS_ZERO:
        code = code - 1 - mask
    level = magnitude.to(tl.int32, bitcast=True) ^ (mask << 31)
    return code, level.to(tl.float32, bitcast=True)
