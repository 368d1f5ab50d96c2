"""Packing and unpacking of codes in the Triton kernels."""

import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.levels import level_of, levels_of_word

__all__ = ["read_levels", "write_codes"]


@triton.jit
def _power_of_three(plane):
    power = tl.where(plane == 1, 3, 1)
    power = tl.where(plane == 2, 9, power)
    power = tl.where(plane == 3, 27, power)
    return tl.where(plane == 4, 81, power)


@triton.jit
def _without_digits(word, count):
    """Return ``word // 3**count`` for a byte, by a product with the reciprocal, rounded up."""
    reciprocal = tl.where(count == 1, 21846, 65536)
    reciprocal = tl.where(count == 2, 7282, reciprocal)
    reciprocal = tl.where(count == 3, 2428, reciprocal)
    reciprocal = tl.where(count == 4, 810, reciprocal)
    reciprocal = tl.where(count == 5, 270, reciprocal)
    return (word * reciprocal) >> 16


@triton.jit
def read_levels(
    codes,
    plane,
    column,
    width,
    live,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Return the float32 levels of the elements ``plane * width + column`` of blocks.

    ``codes`` points to the first byte of each block.
    """
    if PLANE_BYTES == 8:
        code = tl.load(codes + (plane * width + column), mask=live, other=0).to(tl.int32)
        level = level_of(code, LEVELS, MAGNITUDES, HAS_ZERO)
    else:
        inside = column < width
        word = tl.load(codes + column, mask=inside, other=0).to(tl.int32)
        for byte in tl.static_range(1, PLANE_BYTES):
            more = tl.load(codes + (byte * width + column), mask=inside, other=0).to(tl.int32)
            word = word | (more << (8 * byte))
        if PLANES == 5:
            # Each quotient serves two planes, which are in one thread.
            code = _without_digits(word, plane) - 3 * _without_digits(word, plane + 1)
            level = level_of(code, LEVELS, MAGNITUDES, HAS_ZERO)
        elif HAS_ZERO or LEVELS == 0:
            code = (word >> (PLANE_BYTES * plane)) & ((1 << PLANE_BYTES) - 1)
            level = level_of(code, LEVELS, MAGNITUDES, HAS_ZERO)
        else:
            level = levels_of_word(word, plane, LEVELS, MAGNITUDES, PLANE_BYTES)
    return level


@triton.jit
def write_codes(codes, code, plane, column, width, PLANES: tl.constexpr, PLANE_BYTES: tl.constexpr):
    """Pack the codes of a tile, 0 where there is no element; ``codes`` as in :func:`read_levels`."""
    if PLANE_BYTES == 8:
        tl.store(codes + (plane * width + column), code.to(tl.uint8), mask=column < width)
    else:
        if PLANES == 5:
            word = tl.sum(code * _power_of_three(plane), axis=0)
        else:
            word = tl.sum(code << (PLANE_BYTES * plane), axis=0)
        word = word[None, :, :]
        for byte in tl.static_range(PLANE_BYTES):
            packed = ((word >> (8 * byte)) & 255).to(tl.uint8)
            tl.store(codes + (byte * width + column), packed, mask=column < width)
