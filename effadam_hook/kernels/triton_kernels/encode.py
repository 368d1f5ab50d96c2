"""The kernel of ``encode_``; the quantization with error feedback, which the server's kernel shares."""

import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.arithmetic import (
    divide,
    divisor_of,
    is_finite,
    limit,
    magnitude_bits,
    root,
    saturate,
)
from effadam_hook.kernels.triton_kernels.codes import write_codes
from effadam_hook.kernels.triton_kernels.quantize import (
    largest_magnitude_bits,
    quantize,
)
from effadam_hook.kernels.triton_kernels.tile import pointer_to, positions

__all__ = ["encode_blocks", "encode_kernel", "read_divisor"]


@triton.jit
def read_divisor(
    moments,
    slot,
    offset,
    i,
    live,
    numel,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
    real: tl.constexpr,
):
    """Return the divisors of `Preconditioner`; 1 if the slot has no second moments."""
    address = tl.load(moments + slot)
    # A mask of the tile's shape: the interpreter does not broadcast a single truth value.
    present = live & (tl.zeros_like(i) + address != 0)
    v = tl.load(pointer_to(real, address) + offset + i, mask=present, other=0.0)
    return divisor_of(v, live, tl.maximum(numel, 1), BLOCKS, COLS, real)


@triton.jit
def encode_blocks(
    total,
    divisor,
    m,
    v,
    exp_avg,
    exp_avg_sq,
    residual,
    is_used,
    scales,
    codes,
    i,
    live,
    block,
    plane,
    column,
    numel,
    width,
    real: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    """Quantize a tile plus its residual, in units of the divisor if there is one; keep the error.

    ``residual``, ``scales`` and ``codes`` point to the tile's first element, scale and code;
    ``exp_avg`` and ``exp_avg_sq`` to the first moments, of which a finite block keeps ``m`` and ``v``.
    Unless ``is_used``, there is no residual.
    """
    if residual is not None:
        term = total
        # Not `live & is_used`, which the interpreter of Triton 3.9 refuses as a mask.
        present = live if is_used is None else tl.where(is_used, live, False)
        total = saturate(term + tl.load(residual + i, mask=present, other=0.0), term, real)
    value = total
    if divisor is not None:
        value = saturate(divide(total, divisor, real), total, real)
    largest_bits = largest_magnitude_bits(value, live, real)
    kept = live & is_finite(largest_bits, real)
    # Here rather than at the end, so that their registers are free for the rest.
    if exp_avg is not None:
        tl.store(exp_avg + i, m, mask=kept)
        tl.store(exp_avg_sq + i, v, mask=kept)
    code, scale_bits, sent = quantize(
        value,
        largest_bits,
        live,
        numel,
        real,
        BLOCKS,
        COLS,
        LEVELS,
        MAGNITUDES,
        HAS_ZERO,
        ABSMAX,
        SPREAD,
        TOP,
        LARGEST_SCALE,
    )
    pointer = scales.to(tl.pointer_type(tl.uint16)) + block
    tl.store(pointer, scale_bits.to(tl.uint16), mask=numel > 0)
    code_bytes: tl.constexpr = (SIZE + PLANES - 1) // PLANES * PLANE_BYTES
    write_codes(codes + block * code_bytes, code, plane, column, width, PLANES, PLANE_BYTES)
    if divisor is not None:
        sent = limit(sent * divisor, real)
    if residual is not None:
        if is_used is not None:
            kept = tl.where(is_used, kept, False)
        tl.store(residual + i, total - sent, mask=kept)


@triton.jit
def _encode_tile(
    x,
    residual,
    payload,
    piece,
    first,
    start,
    count,
    moments,
    exp_avg,
    exp_avg_sq,
    terms,
    used,
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
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Encode ``count`` elements, from ``first`` on in the piece and from ``start`` on in the bucket."""
    real: tl.constexpr = tl.float64 if RAW == tl.float64 else tl.float32  # noqa: SIM300
    block, plane, column, numel, width, i, live = positions(count, SIZE, BLOCKS, COLS, PLANES, FULL)
    total = tl.load(x + start + i, mask=live, other=0.0).to(real)
    if exp_avg is not None:
        row = terms + tl.load(piece + 6) * 7
        v = tl.load(exp_avg_sq + start + i, mask=live, other=0.0) * tl.load(row + 2).to(real)
        v += total * total * tl.load(row + 3).to(real)
        m = tl.load(exp_avg + start + i, mask=live, other=0.0) * tl.load(row).to(real)
        m += total * tl.load(row + 1).to(real)
        numerator = m * tl.load(row + 4).to(real)
        denominator = root(v, real) * tl.load(row + 5).to(real) + tl.load(row + 6).to(real)
        nothing = (numerator == 0) & (denominator == 0)
        total = divide(tl.where(nothing, 0.0, numerator), tl.where(nothing, 1.0, denominator), real)
        # An infinite v makes an update of zero, which must not count as finite.
        second_finite = is_finite(magnitude_bits(v, real), real)
        total = tl.where(second_finite, total, float("nan"))

    data = payload + tl.load(piece + 5)
    if FULL:
        raw = MAGNITUDES == 0
    else:
        raw = tl.load(piece + 3) != 0
    if raw:
        if exp_avg is not None:
            kept = live & is_finite(magnitude_bits(total, real), real)
            total = tl.where(kept, total, float("nan"))
            tl.store(exp_avg + start + i, m, mask=kept)
            tl.store(exp_avg_sq + start + i, v, mask=kept)
        out = pointer_to(RAW, data + first * RAW_BYTES)
        tl.store(out + i, total.to(RAW), mask=live)
    elif MAGNITUDES > 0:
        divisor = None
        if moments is not None:
            offset = tl.load(piece + 7) + first
            divisor = read_divisor(
                moments, tl.load(piece + 6), offset, i, live, numel, BLOCKS, COLS, real
            )
        encode_blocks(
            total,
            divisor,
            None if exp_avg is None else m,
            None if exp_avg is None else v,
            None if exp_avg is None else exp_avg + start,
            None if exp_avg is None else exp_avg_sq + start,
            None if residual is None else residual + start,
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
def encode_kernel(
    x,
    residual,
    payload,
    owner,
    pieces,
    moments,
    exp_avg,
    exp_avg_sq,
    terms,
    used,
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
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Encode a tile of a bucket.

    Bytes per element, for elements of ``s`` bytes, codes of ``b`` bits and blocks of ``n`` elements:
    reads ``s`` and 4 for the residual, writes 4 for the residual and ``b / 8 + 2 / n``. This is 12.51
    for float32 and ``lloyd4``. An Adam source adds 16, a preconditioner 4.
    """
    program = tl.program_id(0)
    piece = pieces + tl.load(owner + program) * 9
    first = (program - tl.load(piece + 8)) * (SIZE * BLOCKS)
    start = tl.load(piece) + first
    rest = tl.load(piece + 2) - first
    full = (rest >= SIZE * BLOCKS) & (start % 4 == 0)
    full = full & ((tl.load(piece + 3) != 0) == (MAGNITUDES == 0))
    for FULL in tl.static_range(2):
        if full == (FULL == 1):
            step: tl.constexpr = BLOCKS if FULL else PART
            unit: tl.constexpr = 4 if FULL else 1
            count = tl.minimum(rest, SIZE * BLOCKS).to(tl.int32)
            for at in range(0, SIZE * BLOCKS if FULL else count, SIZE * step):
                _encode_tile(
                    x,
                    residual,
                    payload,
                    piece,
                    first + at,
                    start // unit * unit + at,
                    count - at,
                    moments,
                    exp_avg,
                    exp_avg_sq,
                    terms,
                    used,
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
                    ABSMAX,
                    SPREAD,
                    TOP,
                    LARGEST_SCALE,
                )
