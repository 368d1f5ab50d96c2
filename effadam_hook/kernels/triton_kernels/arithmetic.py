"""Roundings, limits and divisors of the Triton kernels, as the reference defines them."""

import triton
import triton.language as tl

__all__ = [
    "block_sum",
    "divide",
    "divisor_of",
    "is_finite",
    "limit",
    "magnitude_bits",
    "root",
    "saturate",
]


@triton.jit
def divide(a, b, real: tl.constexpr):
    """Divide with correct rounding."""
    if real == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def root(a, real: tl.constexpr):
    """Take the correctly rounded square root."""
    if real == tl.float64:
        result = tl.sqrt(a)
    else:
        result = tl.sqrt_rn(a)
    return result


@triton.jit
def magnitude_bits(a, real: tl.constexpr):
    """Return the bits of ``|a|``, which are ordered as the magnitudes, infinity and NaN last."""
    if real == tl.float64:
        bits = a.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def is_finite(bits, real: tl.constexpr):
    """Return whether the number with these :func:`magnitude_bits` is finite."""
    if real == tl.float64:
        finite = bits < 0x7FF0000000000000
    else:
        finite = bits < 0x7F800000
    return finite


@triton.jit
def limit(a, real: tl.constexpr):
    """Clamp to the largest magnitude of the reference; NaN remains NaN."""
    if real == tl.float64:
        largest = 1.7976931348623157e308
    else:
        largest = 3.3895313892515355e38
    a = tl.where(a > largest, largest, a)
    return tl.where(a < -largest, -largest, a)


@triton.jit
def saturate(result, operand, real: tl.constexpr):
    """Clamp the result of a finite operand, whose infinity is an overflow."""
    if real == tl.float64:
        largest = 1.7976931348623157e308
    else:
        largest = 3.3895313892515355e38
    overflow = (tl.abs(operand) < float("inf")) & (tl.abs(result) == float("inf"))
    return tl.where(overflow, tl.where(result < 0, -largest, largest), result)


@triton.jit
def block_sum(a, BLOCKS: tl.constexpr, COLS: tl.constexpr):
    """Sum the blocks of a tile, ``[8, BLOCKS, COLS]`` to ``[1, BLOCKS, 1]``.

    A thread holds all planes of a column and adds them in their order; neighbouring columns are then
    added in pairs. This does not depend on how many columns a thread holds, so that a block has one
    result in full and in partial tiles.
    """
    a = tl.sum(a, axis=0)
    for step in tl.static_range(10):
        if 4 << step <= COLS:
            a = tl.sum(tl.reshape(a, (BLOCKS, COLS >> (step + 1), 2)), axis=2)
    return tl.sum(a, axis=1)[None, :, None]


@triton.jit
def divisor_of(v, live, numel, BLOCKS: tl.constexpr, COLS: tl.constexpr, real: tl.constexpr):
    """Return the divisors of a tile with the second moments ``v``, see ``Preconditioner``.

    ``v`` is 0 where there are no second moments, whose divisor is 1.
    """
    floor = divide(block_sum(v, BLOCKS, COLS), numel.to(real), real) * tl.full((), 1e-3, real)
    if real == tl.float64:
        smallest = 2.2250738585072014e-308
    else:
        smallest = 1.1754943508222875e-38
    usable = (floor >= smallest) & is_finite(magnitude_bits(floor, real), real)
    usable = live & usable
    return tl.where(usable, root(tl.where(usable, v + floor, 1.0), real), 1.0)
