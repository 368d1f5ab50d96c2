"""The kernel of ``reduce_encode_``."""

import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.arithmetic import divide, limit
from effadam_hook.kernels.triton_kernels.codes import read_levels
from effadam_hook.kernels.triton_kernels.decode import read_scales
from effadam_hook.kernels.triton_kernels.encode import encode_blocks, read_divisor
from effadam_hook.kernels.triton_kernels.tile import pointer_to, positions

__all__ = ["reduce_encode_kernel"]


@triton.jit
def _reduce_tile(
    payloads,
    workers,
    stride,
    residual,
    payload,
    source,
    piece,
    first,
    local,
    source_at,
    count,
    moments,
    used,
    FULL: tl.constexpr,
    BLOCKS: tl.constexpr,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    UP_PLANES: tl.constexpr,
    UP_PLANE_BYTES: tl.constexpr,
    UP_LEVELS: tl.constexpr,
    UP_MAGNITUDES: tl.constexpr,
    UP_HAS_ZERO: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Average and encode ``count`` elements, from ``first`` on in the piece, ``local`` in the chunk."""
    real: tl.constexpr = tl.float64 if RAW == tl.float64 else tl.float32  # noqa: SIM300
    block, plane, column, numel, width, i, live = positions(count, SIZE, BLOCKS, COLS, PLANES, FULL)
    if FULL:
        source_raw = UP_MAGNITUDES == 0
        raw = MAGNITUDES == 0
    else:
        source_raw = tl.load(source + 3) != 0
        raw = tl.load(piece + 3) != 0
    up_bytes: tl.constexpr = (SIZE + UP_PLANES - 1) // UP_PLANES * UP_PLANE_BYTES
    scales_at = tl.load(source + 4) + first // SIZE * 2
    codes_at = source_at + first // SIZE * up_bytes
    share = tl.full((1, BLOCKS, 1), 1, tl.int32) * workers
    total = tl.zeros((8, BLOCKS, COLS), real)
    chunk = payloads
    for _ in range(workers):
        if source_raw:
            pointer = pointer_to(RAW, chunk + source_at + first * RAW_BYTES)
            part = tl.load(pointer + i, mask=live, other=0.0).to(real)
            total += divide(part, share.to(real), real)
        elif UP_MAGNITUDES > 0:
            scale = divide(
                read_scales(chunk + scales_at, block, numel).to(real), share.to(real), real
            )
            if UP_PLANES == PLANES:
                up_plane, up_column, up_width = plane, column, width
            else:
                up_width = tl.maximum((numel + UP_PLANES - 1) // UP_PLANES, 1)
                inside = i - block * SIZE
                up_plane, up_column = inside // up_width, inside % up_width
            level = read_levels(
                chunk + codes_at + block * up_bytes,
                up_plane,
                up_column,
                up_width,
                live,
                UP_PLANES,
                UP_PLANE_BYTES,
                UP_LEVELS,
                UP_MAGNITUDES,
                UP_HAS_ZERO,
            )
            total += scale * level.to(real)
        chunk += stride
    divisor = None
    if moments is not None:
        offset = tl.load(piece + 7) + first
        divisor = read_divisor(
            moments, tl.load(piece + 6), offset, i, live, numel, BLOCKS, COLS, real
        )
        total = tl.where(source_raw, total, limit(total * divisor, real))

    data = payload + tl.load(piece + 5)
    if raw:
        out = pointer_to(RAW, data + first * RAW_BYTES)
        tl.store(out + i, total.to(RAW), mask=live)
    elif MAGNITUDES > 0:
        encode_blocks(
            total,
            divisor,
            None,
            None,
            None,
            None,
            None if residual is None else residual + local,
            None if used is None else tl.load(used + tl.load(piece + 6)) != 0,
            payload + tl.load(piece + 4) + first // SIZE * 2,
            data + first // SIZE * ((SIZE + PLANES - 1) // PLANES * PLANE_BYTES),
            i,
            live,
            block,
            plane,
            column,
            numel,
            width,
            real,
            BLOCKS,
            SIZE,
            COLS,
            PLANES,
            PLANE_BYTES,
            LEVELS,
            MAGNITUDES,
            HAS_ZERO,
            ABSMAX,
            SPREAD,
            TOP,
            LARGEST_SCALE,
        )


@triton.jit
def reduce_encode_kernel(
    payloads,
    workers,
    stride,
    residual,
    payload,
    owner,
    sources,
    pieces,
    moments,
    used,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    UP_PLANES: tl.constexpr,
    UP_PLANE_BYTES: tl.constexpr,
    UP_LEVELS: tl.constexpr,
    UP_MAGNITUDES: tl.constexpr,
    UP_HAS_ZERO: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Average a tile of the workers' payloads, and encode it.

    Bytes per element, for ``w`` workers, codes of ``b`` bits and blocks of ``n`` elements: reads
    ``w * (b / 8 + 2 / n)`` and 4 for the residual, writes 4 for the residual and ``b / 8 + 2 / n``.
    This is 10.54 for four workers and ``lloyd4`` both ways. A preconditioner adds 4.
    """
    program = tl.program_id(0)
    which = tl.load(owner + program)
    piece, source = pieces + which * 9, sources + which * 9
    first = (program - tl.load(piece + 8)) * (SIZE * BLOCKS)
    local = tl.load(piece + 1) + first
    source_at = tl.load(source + 5)
    rest = tl.load(piece + 2) - first
    full = (rest >= SIZE * BLOCKS) & (local % 4 == 0) & (source_at % 4 == 0)
    full = full & ((tl.load(source + 3) != 0) == (UP_MAGNITUDES == 0))
    full = full & ((tl.load(piece + 3) != 0) == (MAGNITUDES == 0))
    for FULL in tl.static_range(2):
        if full == (FULL == 1):
            step: tl.constexpr = BLOCKS if FULL else PART
            unit: tl.constexpr = 4 if FULL else 1
            count = tl.minimum(rest, SIZE * BLOCKS).to(tl.int32)
            for at in range(0, SIZE * BLOCKS if FULL else count, SIZE * step):
                _reduce_tile(
                    payloads,
                    workers,
                    stride // unit * unit,
                    residual,
                    payload,
                    source,
                    piece,
                    first + at,
                    local // unit * unit + at,
                    source_at // unit * unit,
                    count - at,
                    moments,
                    used,
                    FULL,
                    step,
                    RAW,
                    RAW_BYTES,
                    UP_PLANES,
                    UP_PLANE_BYTES,
                    UP_LEVELS,
                    UP_MAGNITUDES,
                    UP_HAS_ZERO,
                    SIZE,
                    COLS,
                    PLANES,
                    PLANE_BYTES,
                    LEVELS,
                    MAGNITUDES,
                    HAS_ZERO,
                    ABSMAX,
                    SPREAD,
                    TOP,
                    LARGEST_SCALE,
                )
