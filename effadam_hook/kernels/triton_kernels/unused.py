"""The kernels that find the parameters of a step that are unused, see `effadam_hook.kernels.unused`.

A program reads its tile until it finds a number other than zero, which is mostly among the first 256,
and nothing at all once another program has found one.
"""

import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.tile import pointer_to

__all__ = ["mark_used_input_kernel", "mark_used_mean_kernel"]


@triton.jit
def _mark(flag, values, rows, stride, count, WIDTH: tl.constexpr):
    """Set a flag if one of ``count`` values is not zero, in rows ``stride`` values apart."""
    found = tl.load(flag)
    row = 0
    while (found == 0) & (row < rows):
        at = 0
        while (found == 0) & (at < count):
            i = at + tl.arange(0, WIDTH)
            value = tl.load(values + row * stride + i, mask=i < count, other=0.0)
            if value.dtype == tl.bfloat16:  # Triton 3.9's interpreter compares bits, of -0 too
                value = value.to(tl.float32)
            found = tl.max((value != 0).to(tl.int32), axis=0)
            if found != 0:
                tl.store(flag, 1)
            at += WIDTH
        row += 1


@triton.jit
def mark_used_input_kernel(
    x, used, owner, pieces, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """Set the flag of a tile's parameter if an element of the tile is not zero.

    Bytes per element, for elements of ``s`` bytes: reads ``s`` of an unused parameter, whose residual
    ``encode_kernel`` then neither reads nor writes, and of another one all that comes before its first
    number, 256 elements at a time: mostly ``256 * s`` in all.
    """
    program = tl.program_id(0)
    piece = pieces + tl.load(owner + program) * 9
    first = (program - tl.load(piece + 8)) * (SIZE * BLOCKS)
    count = tl.minimum(tl.load(piece + 2) - first, SIZE * BLOCKS).to(tl.int32)
    if tl.load(piece + 3) == 0:
        _mark(used + tl.load(piece + 6), x + tl.load(piece) + first, 1, 0, count, WIDTH)


@triton.jit
def mark_used_mean_kernel(
    payloads,
    workers,
    stride,
    used,
    owner,
    sources,
    pieces,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Set the flag of a tile's parameter if a worker's scale, or raw element, is not zero.

    Bytes per element, for ``w`` workers and blocks of ``n`` elements: reads ``w * 2 / n`` of an unused
    parameter, or ``w * s`` if it has sent raw elements of ``s`` bytes; of another one mostly those of
    one tile's scales, or of 256 elements, in all.
    """
    program = tl.program_id(0)
    which = tl.load(owner + program)
    piece, source = pieces + which * 9, sources + which * 9
    first = (program - tl.load(piece + 8)) * (SIZE * BLOCKS)
    count = tl.minimum(tl.load(piece + 2) - first, SIZE * BLOCKS).to(tl.int32)
    flag = used + tl.load(piece + 6)
    if tl.load(piece + 3) == 0:
        if tl.load(source + 3) != 0:
            values = pointer_to(RAW, payloads + tl.load(source + 5) + first * RAW_BYTES)
            _mark(flag, values, workers, stride // RAW_BYTES, count, WIDTH)
        else:
            scales = pointer_to(tl.bfloat16, payloads + tl.load(source + 4) + first // SIZE * 2)
            _mark(flag, scales, workers, stride // 2, (count + (SIZE - 1)) // SIZE, WIDTH)
