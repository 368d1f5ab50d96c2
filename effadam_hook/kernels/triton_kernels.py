"""The three kernels for CUDA in Triton, fused: one program per block, one pass over memory.

A program holds its block as a tile whose rows are the planes of the packing (see
:mod:`effadam_hook.wire.quantizers`). Packing is then a sum over a column and needs no exchange between
threads. Decoding is bit-identical to :mod:`effadam_hook.kernels.reference`. Encoding uses another order
of summation, so that a scale may differ by one unit in the last place of bfloat16, and with it a code
at a threshold; all implementations decode a payload to the same values.

After the first call for a wire, calls neither wait for the device nor allocate memory on it: a table of
the positions of all blocks remains on the device, and launches go to the current stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from effadam_hook.kernels.arguments import check_arguments
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.kernels.levels import TABLE_CODES, TABLE_THRESHOLDS, is_linear, level_table
from effadam_hook.wire.layout import Chunk, Wire
from effadam_hook.wire.quantizers import Quantizer

__all__ = ["decode", "encode_", "name", "reduce_encode_"]

name = "triton"

_COLUMNS = tl.constexpr(9)
_RAW_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class _Table:
    """Positions of the blocks of a wire, or of one of its chunks.

    Attributes:
        blocks: Number of programs.
        owner: ``[blocks]`` int32, the index of each block's piece.
        pieces: ``[pieces, 9]`` int64: the columns of ``Piece.row()`` and the piece's first block.
        levels: ``[16 + 8]`` float32: levels by code, then thresholds.
    """

    blocks: int
    owner: Tensor
    pieces: Tensor
    levels: Tensor


_tables: WeakKeyDictionary[Wire, dict[tuple[torch.device, int], _Table]] = WeakKeyDictionary()
_addresses: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
_ADDRESSES_KEPT = 1024


def encode_(
    wire: Wire,
    x: Tensor,
    residual: Tensor | None,
    payload: Tensor,
    dtype: torch.dtype,
    *,
    preconditioner: Preconditioner | None = None,
    adam: AdamSource | None = None,
) -> None:
    """Quantize ``x + residual``; see :func:`effadam_hook.kernels.reference.encode_`."""
    check_arguments(
        wire,
        dtype,
        bucket=x,
        residual=residual,
        payload=payload,
        preconditioner=preconditioner,
        adam=adam,
    )
    table = _table_of(wire, x.device, None)
    if table.blocks == 0:
        return
    terms = None
    if adam is not None:
        terms = adam.terms.pin_memory() if x.is_cuda else adam.terms
        terms = terms.to(x.device, non_blocking=True)
    with _on(x.device):
        _encode_kernel[(table.blocks,)](
            x,
            residual,
            payload,
            table.owner,
            table.pieces,
            table.levels,
            _moments_of(preconditioner, x.device),
            None if adam is None else adam.exp_avg,
            None if adam is None else adam.exp_avg_sq,
            terms,
            RAW=_RAW_TYPES[dtype],
            RAW_BYTES=dtype.itemsize,
            **_constants(wire),
            **_launch(wire),
        )


def reduce_encode_(
    uplink: Wire,
    downlink: Wire,
    server: int,
    payloads: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    payload: Tensor,
    *,
    preconditioner: Preconditioner | None = None,
) -> None:
    """Average and quantize; see :func:`effadam_hook.kernels.reference.reduce_encode_`."""
    check_arguments(
        downlink,
        dtype,
        server=server,
        uplink=uplink,
        payloads=payloads,
        residual=residual,
        payload=payload,
        preconditioner=preconditioner,
    )
    device = payload.device
    source, target = _table_of(uplink, device, server), _table_of(downlink, device, server)
    if target.blocks == 0:
        return
    sent = {f"UP_{key}": value for key, value in _constants(uplink).items()}
    with _on(device):
        _reduce_encode_kernel[(target.blocks,)](
            payloads,
            payloads.shape[0],
            payloads.shape[1],
            residual,
            payload,
            target.owner,
            source.pieces,
            target.pieces,
            source.levels,
            target.levels,
            _moments_of(preconditioner, device),
            RAW=_RAW_TYPES[dtype],
            RAW_BYTES=dtype.itemsize,
            UP_PLANES=sent["UP_PLANES"],
            UP_PLANE_BYTES=sent["UP_PLANE_BYTES"],
            UP_MAGNITUDES=sent["UP_MAGNITUDES"],
            UP_LINEAR=sent["UP_LINEAR"],
            **_constants(downlink),
            **_launch(downlink),
        )


def decode(
    wire: Wire,
    payload: Tensor,
    out: Tensor,
    dtype: torch.dtype,
    *,
    preconditioner: Preconditioner | None = None,
) -> None:
    """Dequantize; see :func:`effadam_hook.kernels.reference.decode`."""
    check_arguments(wire, dtype, bucket=out, payload=payload, preconditioner=preconditioner)
    table = _table_of(wire, out.device, None)
    if table.blocks == 0:
        return
    constants = _constants(wire)
    with _on(out.device):
        _decode_kernel[(table.blocks,)](
            payload,
            out,
            table.owner,
            table.pieces,
            table.levels,
            _moments_of(preconditioner, out.device),
            RAW=_RAW_TYPES[dtype],
            RAW_BYTES=dtype.itemsize,
            **{
                key: constants[key]
                for key in ("SIZE", "COLS", "PLANES", "PLANE_BYTES", "MAGNITUDES", "LINEAR")
            },
            **_launch(wire),
        )


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _planes(quantizer: Quantizer) -> int:
    """Return the number of rows of a tile in use: the planes of the packing, or 8 for raw elements."""
    return 8 if quantizer.is_raw else quantizer.planes


def _constants(wire: Wire) -> dict[str, Any]:
    quantizer = wire.quantizer
    magnitudes = quantizer.magnitudes
    planes = _planes(quantizer)
    return {
        "SIZE": wire.block_size,
        "COLS": triton.next_power_of_2(-(-wire.block_size // planes)),
        "PLANES": planes,
        "PLANE_BYTES": quantizer.plane_bytes,
        "MAGNITUDES": len(magnitudes),
        "HAS_ZERO": int(quantizer.has_zero),
        "LINEAR": int(is_linear(quantizer)),
        "ABSMAX": int(wire.scale_rule == "absmax"),
        "SPREAD": quantizer.spread or 0.0,
        "TOP": magnitudes[-1] if magnitudes else 1.0,
        "LARGEST_SCALE": 0.0 if quantizer.is_raw else quantizer.largest_scale,
    }


def _launch(wire: Wire) -> dict[str, Any]:
    # Eight elements per thread, so that every load is wide. Multiply and add are not fused, so that the
    # residual is exactly the difference to what is sent.
    threads = triton.next_power_of_2(wire.block_size) // 8
    return {"num_warps": min(8, max(1, threads // 32)), "enable_fp_fusion": False}


def _table_of(wire: Wire, device: torch.device, server: int | None) -> _Table:
    """Return the table of one chunk, or of all chunks in the order of a payload."""
    tables = _tables.setdefault(wire, {})
    key = (device, -1 if server is None else server)
    if key not in tables:
        whole = [(chunk, i * wire.stride_bytes) for i, chunk in enumerate(wire.chunks)]
        chunks = whole if server is None else [(wire.chunks[server], 0)]
        tables[key] = _make_table(wire, chunks, device)
    return tables[key]


def _make_table(wire: Wire, chunks: list[tuple[Chunk, int]], device: torch.device) -> _Table:
    rows: list[tuple[int, ...]] = []
    counts: list[int] = []
    for chunk, shift in chunks:
        for piece in chunk.pieces:
            start, local, numel, raw, scales_at, data_at, slot, offset = piece.row()
            at = (scales_at + shift, data_at + shift)
            rows.append((start, local, numel, raw, *at, slot, offset, sum(counts)))
            counts.append(-(-numel // wire.block_size))
    quantizer = wire.quantizer
    levels = level_table(quantizer)
    thresholds = quantizer.thresholds if levels else ()
    table = (
        *levels,
        *[0.0] * (TABLE_CODES - len(levels)),
        *thresholds,
        *[0.0] * (TABLE_THRESHOLDS - len(thresholds)),
    )
    # On the CPU, whatever the default device is.
    owner = torch.repeat_interleave(
        torch.arange(len(counts), dtype=torch.int32, device="cpu"),
        torch.tensor(counts, dtype=torch.int64, device="cpu"),
    )
    pieces = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, _COLUMNS.value)
    looked_up = torch.tensor(table, dtype=torch.float32, device="cpu")
    return _Table(len(owner), owner.to(device), pieces.to(device), looked_up.to(device))


def _moments_of(preconditioner: Preconditioner | None, device: torch.device) -> Tensor | None:
    """Return the addresses of the second moments by slot, 0 for none; cached, as they rarely change."""
    if preconditioner is None:
        return None
    moments = preconditioner.second_moments
    found = tuple(0 if moment is None else moment.data_ptr() for moment in moments)
    key = (device, found)
    if key not in _addresses:
        if len(_addresses) >= _ADDRESSES_KEPT:
            _addresses.pop(next(iter(_addresses)))
        _addresses[key] = torch.tensor(found, dtype=torch.int64, device=device)
    return _addresses[key]


@triton.jit
def _divide(a, b, real: tl.constexpr):
    """Divide with correct rounding, as the reference does."""
    if real == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def _root(a, real: tl.constexpr):
    """Take the correctly rounded square root."""
    if real == tl.float64:
        root = tl.sqrt(a)
    else:
        root = tl.sqrt_rn(a)
    return root


@triton.jit
def _magnitude_bits(a, real: tl.constexpr):
    if real == tl.float64:
        bits = a.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def _is_finite(bits, real: tl.constexpr):
    if real == tl.float64:
        finite = bits < 0x7FF0000000000000
    else:
        finite = bits < 0x7F800000
    return finite


@triton.jit
def _limit(a, real: tl.constexpr):
    """Clamp to the largest magnitude of the reference; NaN remains NaN."""
    if real == tl.float64:
        largest = 1.7976931348623157e308
    else:
        largest = 3.3895313892515355e38
    a = tl.where(a > largest, largest, a)
    return tl.where(a < -largest, -largest, a)


@triton.jit
def _saturate(result, operand, real: tl.constexpr):
    """Clamp the result of a finite operand, whose infinity is an overflow."""
    finite = _is_finite(_magnitude_bits(operand, real), real)
    overflow = finite & (tl.abs(result) == float("inf"))
    return tl.where(overflow, _limit(result, real), result)


@triton.jit
def _scale_at(pointer):
    """Load a bfloat16 as a float32."""
    bits = tl.load(pointer.to(tl.pointer_type(tl.uint16))).to(tl.int32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_three(plane):
    power = tl.where(plane == 1, 3, 1)
    power = tl.where(plane == 2, 9, power)
    power = tl.where(plane == 3, 27, power)
    return tl.where(plane == 4, 81, power)


@triton.jit
def _level_of(code, table, MAGNITUDES: tl.constexpr, LINEAR: tl.constexpr):
    if LINEAR:
        level = (code - (MAGNITUDES - 1)).to(tl.float32)
    else:
        level = tl.load(table + code)
    return level


@triton.jit
def _read_levels(
    codes,
    plane,
    column,
    width,
    live,
    table,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """Read the levels of the elements ``plane * width + column`` of a block."""
    if PLANE_BYTES == 8:
        code = tl.load(codes + plane * width + column, mask=live, other=0).to(tl.int32)
    else:
        inside = column < width
        word = tl.load(codes + column, mask=inside, other=0).to(tl.int32)
        for byte in tl.static_range(1, PLANE_BYTES):
            more = tl.load(codes + byte * width + column, mask=inside, other=0).to(tl.int32)
            word = word | (more << (8 * byte))
        if PLANES == 5:
            code = (word // _power_of_three(plane)) % 3
        else:
            code = (word >> (PLANE_BYTES * plane).to(tl.int32)) & ((1 << PLANE_BYTES) - 1)
    return _level_of(code, table, MAGNITUDES, LINEAR)


@triton.jit
def _divisor(moments, slot, offset, i, live, numel, real: tl.constexpr):
    """Return the divisor of `Preconditioner`; 1 if the slot has no second moments."""
    address = tl.load(moments + slot)
    # Masks of the tile's shape: the interpreter does not broadcast a single truth value.
    present = live & (tl.zeros_like(i) + address != 0)
    v = tl.load(address.to(tl.pointer_type(real)) + offset + i, mask=present, other=0.0)
    floor = _divide(tl.sum(v), numel.to(real), real) * tl.full((), 1e-3, real)
    floor = tl.zeros_like(v) + floor
    if real == tl.float64:
        smallest = 2.2250738585072014e-308
    else:
        smallest = 1.1754943508222875e-38
    usable = live & (floor >= smallest) & _is_finite(_magnitude_bits(floor, real), real)
    return tl.where(usable, _root(tl.where(usable, v + floor, 1.0), real), 1.0)


@triton.jit
def _quantize(
    value,
    plane,
    column,
    width,
    live,
    numel,
    scale_out,
    codes_out,
    table,
    real: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LINEAR: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Quantize a tile, steps [1] to [4] of `wire.quantizers`, and write its scale and codes.

    Returns the decoded values, and a mask of the elements to keep: those of a finite block.
    """
    magnitudes = _magnitude_bits(value, real)
    largest_bits = tl.max(tl.where(live, magnitudes, 0))
    finite = _is_finite(largest_bits, real)
    # [1]
    if real == tl.float64:
        usable = finite & (largest_bits >= (1023 - 100) << 52)
        bits = tl.where(usable, largest_bits, 1023 << 52)
        exponent = tl.minimum((bits >> 52) - 1023, 1022)
        power = ((exponent + 1023) << 52).to(real, bitcast=True)
        factor = ((1023 - exponent) << 52).to(real, bitcast=True)
        largest = bits.to(real, bitcast=True)
    else:
        usable = finite & (largest_bits >= (127 - 100) << 23)
        bits = tl.where(usable, largest_bits, 127 << 23)
        exponent = tl.minimum((bits >> 23) - 127, 126)
        power = ((exponent + 127) << 23).to(real, bitcast=True)
        factor = ((127 - exponent) << 23).to(real, bitcast=True)
        largest = bits.to(real, bitcast=True)
    y = tl.where(live & usable, value, 0.0) * factor
    # [2]
    if ABSMAX or SPREAD == 0:
        provisional = _divide(largest * factor, tl.full((), TOP, real), real)
    else:
        mean = _divide(tl.sum(y * y), numel.to(real), real)
        provisional = _root(mean, real) * tl.full((), SPREAD, real)
    provisional = tl.where(usable, provisional, 1.0)
    # [3]
    ratio = tl.abs(y) * _divide(tl.full((), 1.0, real), provisional, real)
    if LINEAR:
        index = ratio.to(tl.int32)
        index += (ratio - index.to(real) > 0.5).to(tl.int32)
        index = tl.minimum(index, MAGNITUDES - 1)
    else:
        index = tl.zeros_like(ratio).to(tl.int32)
        for t in tl.static_range(MAGNITUDES - 1):
            index += (ratio > tl.load(table + 16 + t).to(real)).to(tl.int32)
    code = tl.where(y < 0, MAGNITUDES - 1 - index, MAGNITUDES - HAS_ZERO + index)
    q = tl.where(live, _level_of(code, table, MAGNITUDES, LINEAR).to(real), 0.0)
    # [4]
    if ABSMAX:
        scale = provisional * power
    else:
        squares = tl.where(usable, tl.sum(q * q), 1.0)
        scale = _divide(tl.sum(y * q), squares, real) * power
    scale = tl.minimum(scale, LARGEST_SCALE).to(tl.float32)
    scale_bits = scale.to(tl.int32, bitcast=True)
    scale_bits = (scale_bits + 0x7FFF + ((scale_bits >> 16) & 1)) >> 16
    scale_bits = tl.where(usable, scale_bits, tl.where(finite, 0, 0x7FC0))
    tl.store(scale_out.to(tl.pointer_type(tl.uint16)), scale_bits.to(tl.uint16))

    code = tl.where(live & usable, code, 0)
    if PLANE_BYTES == 8:
        tl.store(codes_out + plane * width + column, code.to(tl.uint8), mask=column < width)
    else:
        if PLANES == 5:
            word = tl.sum(code * _power_of_three(plane).to(tl.int32), axis=0)
        else:
            word = tl.sum(code << (PLANE_BYTES * plane).to(tl.int32), axis=0)
        columns = tl.arange(0, column.shape[1])
        for byte in tl.static_range(PLANE_BYTES):
            packed = ((word >> (8 * byte)) & 255).to(tl.uint8)
            tl.store(codes_out + byte * width + columns, packed, mask=columns < width)
    decoded = (scale_bits << 16).to(tl.float32, bitcast=True).to(real) * q
    # A mask of the tile's shape: the interpreter does not broadcast a single truth value.
    kept = live & _is_finite(tl.zeros_like(magnitudes) + largest_bits, real)
    return tl.where(usable, decoded, 0.0), kept


@triton.jit
def _encode_block(
    total,
    divisor,
    residual,
    at,
    piece,
    block,
    payload,
    data,
    plane,
    column,
    width,
    live,
    numel,
    table,
    real: tl.constexpr,
    SIZE: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LINEAR: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Quantize a tile plus its residual, in units of the divisor if there is one; keep the error.

    Returns a mask of the elements to keep: those of a finite block.
    """
    if residual is not None:
        term = total
        total = _saturate(term + tl.load(residual + at, mask=live, other=0.0), term, real)
    value = total
    if divisor is not None:
        value = _saturate(_divide(total, divisor, real), total, real)
    code_bytes = (SIZE + PLANES - 1) // PLANES * PLANE_BYTES
    sent, kept = _quantize(
        value,
        plane,
        column,
        width,
        live,
        numel,
        payload + tl.load(piece + 4) + 2 * block,
        data + block * code_bytes,
        table,
        real,
        PLANES,
        PLANE_BYTES,
        MAGNITUDES,
        HAS_ZERO,
        LINEAR,
        ABSMAX,
        SPREAD,
        TOP,
        LARGEST_SCALE,
    )
    if divisor is not None:
        sent = _limit(sent * divisor, real)
    if residual is not None:
        tl.store(residual + at, total - sent, mask=kept)
    return kept


@triton.jit
def _encode_kernel(
    x,
    residual,
    payload,
    owner,
    pieces,
    table,
    moments,
    exp_avg,
    exp_avg_sq,
    terms,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LINEAR: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    real: tl.constexpr = tl.float64 if tl.float64 == RAW else tl.float32
    program = tl.program_id(0).to(tl.int64)
    piece = pieces + tl.load(owner + program).to(tl.int64) * _COLUMNS
    block = program - tl.load(piece + 8)
    first = block * SIZE
    numel = tl.minimum(tl.load(piece + 2) - first, SIZE)
    width = (numel + PLANES - 1) // PLANES
    plane = tl.arange(0, 8)[:, None].to(tl.int64)
    column = tl.arange(0, COLS)[None, :].to(tl.int64)
    i = plane * width + column
    live = (column < width) & (i < numel) & (plane < PLANES)
    at = tl.load(piece) + first + i
    raw = tl.load(piece + 3) != 0
    slot = tl.load(piece + 6)

    total = tl.load(x + at, mask=live, other=0.0).to(real)
    if exp_avg is not None:
        row = terms + slot * 7
        v = tl.load(exp_avg_sq + at, mask=live, other=0.0) * tl.load(row + 2).to(real)
        v += total * total * tl.load(row + 3).to(real)
        m = tl.load(exp_avg + at, mask=live, other=0.0) * tl.load(row).to(real)
        m += total * tl.load(row + 1).to(real)
        numerator = m * tl.load(row + 4).to(real)
        denominator = _root(v, real) * tl.load(row + 5).to(real) + tl.load(row + 6).to(real)
        nothing = (numerator == 0) & (denominator == 0)
        total = _divide(
            tl.where(nothing, 0.0, numerator), tl.where(nothing, 1.0, denominator), real
        )
        # An infinite v makes an update of zero, which must not count as finite.
        second_finite = _is_finite(_magnitude_bits(v, real), real)
        total = tl.where(second_finite, total, float("nan"))

    data = payload + tl.load(piece + 5)
    if raw:
        if exp_avg is not None:
            kept = live & _is_finite(_magnitude_bits(total, real), real)
            total = tl.where(kept, total, float("nan"))
            tl.store(exp_avg + at, m, mask=kept)
            tl.store(exp_avg_sq + at, v, mask=kept)
        out = (data + first * RAW_BYTES).to(tl.pointer_type(RAW))
        tl.store(out + i, total.to(RAW), mask=live)
    elif MAGNITUDES > 0:
        divisor = None
        if moments is not None:
            divisor = _divisor(moments, slot, tl.load(piece + 7) + first, i, live, numel, real)
        kept = _encode_block(
            total,
            divisor,
            residual,
            at,
            piece,
            block,
            payload,
            data,
            plane,
            column,
            width,
            live,
            numel,
            table,
            real,
            SIZE,
            PLANES,
            PLANE_BYTES,
            MAGNITUDES,
            HAS_ZERO,
            LINEAR,
            ABSMAX,
            SPREAD,
            TOP,
            LARGEST_SCALE,
        )
        if exp_avg is not None:
            tl.store(exp_avg + at, m, mask=kept)
            tl.store(exp_avg_sq + at, v, mask=kept)


@triton.jit
def _reduce_encode_kernel(
    payloads,
    workers,
    stride,
    residual,
    payload,
    owner,
    sources,
    pieces,
    up_table,
    table,
    moments,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    UP_PLANES: tl.constexpr,
    UP_PLANE_BYTES: tl.constexpr,
    UP_MAGNITUDES: tl.constexpr,
    UP_LINEAR: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LINEAR: tl.constexpr,
    ABSMAX: tl.constexpr,
    SPREAD: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    real: tl.constexpr = tl.float64 if tl.float64 == RAW else tl.float32
    program = tl.program_id(0).to(tl.int64)
    which = tl.load(owner + program).to(tl.int64)
    piece, source = pieces + which * _COLUMNS, sources + which * _COLUMNS
    block = program - tl.load(piece + 8)
    first = block * SIZE
    numel = tl.minimum(tl.load(piece + 2) - first, SIZE)
    width = (numel + PLANES - 1) // PLANES
    plane = tl.arange(0, 8)[:, None].to(tl.int64)
    column = tl.arange(0, COLS)[None, :].to(tl.int64)
    i = plane * width + column
    live = (column < width) & (i < numel) & (plane < PLANES)
    at = tl.load(piece + 1) + first + i
    slot = tl.load(piece + 6)

    share = tl.full((), 1, tl.int64) * workers
    source_raw = tl.load(source + 3) != 0
    source_data, source_scales = tl.load(source + 5), tl.load(source + 4)
    total = tl.zeros((8, COLS), real)
    chunk = payloads
    for _ in range(workers):
        if source_raw:
            start = (chunk + source_data + first * RAW_BYTES).to(tl.pointer_type(RAW))
            part = tl.load(start + i, mask=live, other=0.0).to(real)
            total += _divide(part, share.to(real), real)
        elif UP_MAGNITUDES > 0:
            up_bytes = (SIZE + UP_PLANES - 1) // UP_PLANES * UP_PLANE_BYTES
            codes = chunk + source_data + block * up_bytes
            scale = _scale_at(chunk + source_scales + 2 * block).to(real)
            if UP_PLANES == PLANES:
                level = _read_levels(
                    codes,
                    plane,
                    column,
                    width,
                    live,
                    up_table,
                    UP_PLANES,
                    UP_PLANE_BYTES,
                    UP_MAGNITUDES,
                    UP_LINEAR,
                )
            else:
                up_width = (numel + UP_PLANES - 1) // UP_PLANES
                level = _read_levels(
                    codes,
                    i // up_width,
                    i % up_width,
                    up_width,
                    live,
                    up_table,
                    UP_PLANES,
                    UP_PLANE_BYTES,
                    UP_MAGNITUDES,
                    UP_LINEAR,
                )
            total += _divide(scale, share.to(real), real) * level.to(real)
        chunk += stride
    divisor = None
    if moments is not None:
        divisor = _divisor(moments, slot, tl.load(piece + 7) + first, i, live, numel, real)
        total = tl.where(source_raw, total, _limit(total * divisor, real))

    data = payload + tl.load(piece + 5)
    if tl.load(piece + 3) != 0:
        out = (data + first * RAW_BYTES).to(tl.pointer_type(RAW))
        tl.store(out + i, total.to(RAW), mask=live)
    elif MAGNITUDES > 0:
        _encode_block(
            total,
            divisor,
            residual,
            at,
            piece,
            block,
            payload,
            data,
            plane,
            column,
            width,
            live,
            numel,
            table,
            real,
            SIZE,
            PLANES,
            PLANE_BYTES,
            MAGNITUDES,
            HAS_ZERO,
            LINEAR,
            ABSMAX,
            SPREAD,
            TOP,
            LARGEST_SCALE,
        )


@triton.jit
def _decode_kernel(
    payload,
    out,
    owner,
    pieces,
    table,
    moments,
    RAW: tl.constexpr,
    RAW_BYTES: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_BYTES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    LINEAR: tl.constexpr,
):
    real: tl.constexpr = tl.float64 if tl.float64 == RAW else tl.float32
    program = tl.program_id(0).to(tl.int64)
    piece = pieces + tl.load(owner + program).to(tl.int64) * _COLUMNS
    block = program - tl.load(piece + 8)
    first = block * SIZE
    numel = tl.minimum(tl.load(piece + 2) - first, SIZE)
    width = (numel + PLANES - 1) // PLANES
    plane = tl.arange(0, 8)[:, None].to(tl.int64)
    column = tl.arange(0, COLS)[None, :].to(tl.int64)
    i = plane * width + column
    live = (column < width) & (i < numel) & (plane < PLANES)
    target = out + tl.load(piece) + first + i
    data = payload + tl.load(piece + 5)
    if tl.load(piece + 3) != 0:
        start = (data + first * RAW_BYTES).to(tl.pointer_type(RAW))
        value = tl.load(start + i, mask=live, other=0.0).to(real)
        tl.store(target, value.to(out.dtype.element_ty), mask=live)
    elif MAGNITUDES > 0:
        code_bytes = (SIZE + PLANES - 1) // PLANES * PLANE_BYTES
        scale = _scale_at(payload + tl.load(piece + 4) + 2 * block).to(real)
        level = _read_levels(
            data + block * code_bytes,
            plane,
            column,
            width,
            live,
            table,
            PLANES,
            PLANE_BYTES,
            MAGNITUDES,
            LINEAR,
        )
        value = scale * level.to(real)
        if moments is not None:
            offset = tl.load(piece + 7) + first
            divisor = _divisor(moments, tl.load(piece + 6), offset, i, live, numel, real)
            value = _limit(value * divisor, real)
        tl.store(target, value.to(out.dtype.element_ty), mask=live)
