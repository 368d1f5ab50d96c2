"""The kernel of ``decode``."""

import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.arithmetic import limit
from effadam_hook.kernels.triton_kernels.codes import read_levels
from effadam_hook.kernels.triton_kernels.encode import read_divisor
from effadam_hook.kernels.triton_kernels.tile import pointer_to, positions

__all__ = ["decode_kernel", "read_scales"]


@triton.jit
def read_scales(scales, block, numel):
    """Read the scales of a tile, bfloat16, as float32, ``[1, BLOCKS, 1]``."""
    pointer = scales.to(tl.pointer_type(tl.uint16)) + block
    bits = tl.load(pointer, mask=numel > 0, other=0).to(tl.int32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _decode_tile(
    payload,
    out,
    piece,
    first,
    start,
    data_at,
    count,
    moments,
    FULL: tl.constexpr,
    BLOCKS: tl.constexpr,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Decode ``count`` elements, from ``first`` on in the piece, to ``start`` in the bucket."""
    real: tl.constexpr = tl.float64 if RAW == tl.float64 else tl.float32  # noqa: SIM300
    block, plane, column, numel, width, i, live = positions(count, SIZE, BLOCKS, COLS, PLANES, FULL)
    if FULL:
        raw = MAGNITUDES == 0
    else:
        raw = tl.load(piece + 3) != 0
    if raw:
        source = pointer_to(RAW, payload + data_at + first * RAW_BYTES)
        value = tl.load(source + i, mask=live, other=0.0).to(real)
        tl.store(out + start + i, value.to(out.dtype.element_ty), mask=live)
    elif MAGNITUDES > 0:
        code_bytes: tl.constexpr = (SIZE + PLANES - 1) // PLANES * PLANE_BYTES
        scale = read_scales(payload + tl.load(piece + 4) + first // SIZE * 2, block, numel)
        level = read_levels(
            payload + data_at + first // SIZE * code_bytes + block * code_bytes,
            plane,
            column,
            width,
            live,
            PLANES,
            PLANE_BYTES,
            LEVELS,
            MAGNITUDES,
            HAS_ZERO,
        )
        value = scale.to(real) * level.to(real)
        if moments is not None:
            offset = tl.load(piece + 7) + first
            divisor = read_divisor(
                moments, tl.load(piece + 6), offset, i, live, numel, BLOCKS, COLS, real
            )
            value = limit(value * divisor, real)
        tl.store(out + start + i, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def decode_kernel(
    payload,
    out,
    owner,
    pieces,
    moments,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Decode a tile of a payload.

    Bytes per element, for elements of ``s`` bytes, codes of ``b`` bits and blocks of ``n`` elements:
    reads ``b / 8 + 2 / n``, writes ``s``. This is 4.51 for float32 and ``lloyd4``. A preconditioner
    adds 4.
    """
    program = tl.program_id(0)
    piece = pieces + tl.load(owner + program) * 9
    first = (program - tl.load(piece + 8)) * (SIZE * BLOCKS)
    start = tl.load(piece) + first
    data_at = tl.load(piece + 5)
    rest = tl.load(piece + 2) - first
    full = (rest >= SIZE * BLOCKS) & (start % 4 == 0) & (data_at % 4 == 0)
    full = full & ((tl.load(piece + 3) != 0) == (MAGNITUDES == 0))
    for FULL in tl.static_range(2):
        if full == (FULL == 1):
            step: tl.constexpr = BLOCKS if FULL else PART
            unit: tl.constexpr = 4 if FULL else 1
            count = tl.minimum(rest, SIZE * BLOCKS).to(tl.int32)
            for at in range(0, SIZE * BLOCKS if FULL else count, SIZE * step):
                _decode_tile(
                    payload,
                    out,
                    piece,
                    first + at,
                    start // unit * unit + at,
                    data_at // unit * unit,
                    count - at,
                    moments,
                    FULL,
                    step,
                    RAW,
                    RAW_BYTES,
                    SIZE,
                    COLS,
                    PLANES,
                    PLANE_BYTES,
                    LEVELS,
                    MAGNITUDES,
                    HAS_ZERO,
                )
