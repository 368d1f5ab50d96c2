"""Quantization of a tile in the Triton kernels, steps [1] to [4] of `effadam_hook.wire.quantizers`."""

import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.arithmetic import (
    block_sum,
    divide,
    is_finite,
    magnitude_bits,
    root,
)
from effadam_hook.kernels.triton_kernels.levels import nearest

__all__ = ["largest_magnitude_bits", "quantize"]


@triton.jit
def largest_magnitude_bits(value, live, real: tl.constexpr):
    """Return the bits of the largest magnitude of each block of a tile, ``[1, BLOCKS, 1]``."""
    magnitudes = tl.where(live, magnitude_bits(value, real), 0)
    return tl.max(tl.max(magnitudes, axis=0), axis=1)[None, :, None]


@triton.jit
def quantize(
    value,
    largest_bits,
    live,
    numel,
    real: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
    LEVELS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Quantize the blocks of a tile.

    Returns:
        The codes; the bits of the bfloat16 scales, ``[1, BLOCKS, 1]``; and the decoded values, 0 in a
        block that is not finite.
    """
    finite = is_finite(largest_bits, real)
    # [1]
    if real == tl.float64:
        usable = finite & (largest_bits >= (1023 - 100) << 52)
        bits = tl.where(usable, largest_bits, 1023 << 52)
        exponent = tl.minimum((bits >> 52) - 1023, 1022)
        power = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
        factor = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
        largest = bits.to(tl.float64, bitcast=True)
    else:
        usable = finite & (largest_bits >= (127 - 100) << 23)
        bits = tl.where(usable, largest_bits, 127 << 23)
        exponent = tl.minimum((bits >> 23) - 127, 126)
        power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        factor = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        largest = bits.to(tl.float32, bitcast=True)
    y = tl.where(live & usable, value, 0.0) * factor
    # [2]
    if ABSMAX or SPREAD == 0:
        provisional = divide(largest * factor, tl.full((), TOP, real), real)
    else:
        squares = block_sum(y * y, BLOCKS, COLS)
        mean = divide(squares, tl.maximum(numel, 1).to(real), real)
        provisional = root(mean, real) * tl.full((), SPREAD, real)
    provisional = tl.where(usable, provisional, 1.0)
    # [3]
    ratio = tl.abs(y) * divide(tl.full((), 1.0, real), provisional, real)
    code, level = nearest(ratio, y < 0, LEVELS, MAGNITUDES, HAS_ZERO)
    code = tl.where(live & usable, code, 0)
    q = tl.where(live, level.to(real), 0.0)
    # [4]
    if ABSMAX:
        scale = provisional * power
    else:
        products = block_sum(y * q, BLOCKS, COLS)
        squares = block_sum(q * q, BLOCKS, COLS)
        scale = divide(products, tl.where(usable, squares, 1.0), real) * power
    scale = tl.minimum(scale, LARGEST_SCALE).to(tl.float32)
    scale_bits = scale.to(tl.int32, bitcast=True)
    scale_bits = (scale_bits + 0x7FFF + ((scale_bits >> 16) & 1)) >> 16
    scale_bits = tl.where(usable, scale_bits, 0)
    decoded = (scale_bits << 16).to(tl.float32, bitcast=True).to(real) * q
    return code, tl.where(finite, scale_bits, 0x7FC0), decoded
