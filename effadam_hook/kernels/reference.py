"""The three kernels in plain torch: short, slow, and the definition of every result.

The arithmetic is float32, or float64 if the bucket is float64. Every sum over a block runs over 16
lanes (element ``i`` in lane ``i % 16``) and then halves the lanes until one is left, so that another
implementation can reproduce it to the bit. Blocks are independent: the result of a block does not
depend on the bucket, the chunk or the server to which it belongs.

Special cases:

- A block whose largest magnitude is below 2**-100, zeros included, has the scale 0. It decodes to
  zeros, and all of it remains in the residual.
- A block with an infinity or a NaN has a NaN scale and decodes to NaN everywhere. Its residual remains
  unchanged and finite. Raw elements carry their own infinities and NaNs.
- Finite input never becomes infinite. A scale is limited so that the top level is finite in bfloat16
  and therefore in float32. If a sum ``x + residual`` of finite terms overflows, or a quotient or
  product with a preconditioner's divisor, the result is the largest finite value of its sign: in
  float32 arithmetic the largest bfloat16, 3.39e38. The part beyond it is lost; no residual has it.
- The mean of raw elements overflows like that of a dense all-reduce. A value beyond the range of a
  float16 bucket becomes an infinity there, to which a ``GradScaler`` responds with a smaller scale. An
  Adam update whose second moment overflows, at gradients above 1.8e19, is not finite.
- Padding elements, at the end of a partial block, are not part of any sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effadam_hook.kernels.arguments import check_arguments, compute_dtype
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.kernels.quantize import exact_sqrt, lane_sum, pack, quantize, unpack
from effadam_hook.wire.layout import Piece, Wire
from effadam_hook.wire.quantizers import SCALE_BYTES

__all__ = ["decode", "encode_", "name", "reduce_encode_"]

name = "reference"


def encode_(
    wire: Wire,
    x: Tensor,
    residual: Tensor | None,
    payload: Tensor,
    dtype: torch.dtype,
    *,
    preconditioner: Preconditioner | None = None,
    adam: AdamSource | None = None,
    used: Tensor | None = None,
) -> None:
    """Quantize ``x + residual`` into ``payload`` and keep the error in ``residual``.

    Args:
        wire: The uplink's layout.
        x: ``[numel]``, the bucket, any floating dtype.
        residual: ``[numel]``, float32 (float64 for a float64 bucket), updated in place; None means
            no error feedback.
        payload: ``[servers, stride_bytes]`` uint8, overwritten except for its padding.
        dtype: The dtype in which raw elements travel; float64 makes the arithmetic float64.
        preconditioner: Second moments by whose root blocks are divided before they are quantized.
        adam: Moments that turn ``x`` into the update that is encoded in its place.
        used: ``[slots]`` int32, overwritten. A parameter of which all elements of ``x`` are zero gets a
            0, and its residual is neither sent nor changed. None sends all residuals.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, a device or a memory layout is wrong.
    """
    check_arguments(
        wire,
        dtype,
        bucket=x,
        residual=residual,
        payload=payload,
        preconditioner=preconditioner,
        adam=adam,
        used=used,
    )
    if used is not None:
        used.zero_()
        for piece in (piece for chunk in wire.chunks for piece in chunk.pieces):
            used[piece.slot] |= bool(x[piece.start : piece.start + piece.numel].any())
    for chunk, out in zip(wire.chunks, payload, strict=True):
        for piece in chunk.pieces:
            here = slice(piece.start, piece.start + piece.numel)
            error = None if residual is None or _is_unused(piece, used) else residual[here]
            values = x[here].to(compute_dtype(dtype)) if adam is not None else x[here]
            moments = None if adam is None else _Moments(adam, piece)
            if moments is not None:
                values = moments.update(values)
            divisor = _divisor(wire, piece, preconditioner)
            _encode_piece(wire, piece, values, error, dtype, out, divisor, moments)


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
    used: Tensor | None = None,
) -> None:
    """Average the workers' payloads, add the server's residual, and quantize again.

    Args:
        uplink: Layout of ``payloads``.
        downlink: Layout of ``payload``.
        server: Index of the chunk.
        payloads: ``[world_size, stride_bytes]`` uint8, in the order of the ranks.
        residual: ``[chunk numel]``, float32 (float64 for a float64 bucket), updated in place; None
            means no error feedback.
        dtype: The dtype in which raw elements travel; float64 makes the arithmetic float64.
        payload: ``[stride_bytes]`` uint8, overwritten except for its padding.
        preconditioner: Second moments by whose root blocks were divided, and are divided again.
        used: ``[slots]`` int32, overwritten. A parameter for which the scales of all workers, or their
            raw elements, are zero gets a 0, and its residual is neither sent nor changed. None sends
            all residuals.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, a device or a memory layout is wrong.
    """
    check_arguments(
        downlink,
        dtype,
        server=server,
        uplink=uplink,
        payloads=payloads,
        residual=residual,
        payload=payload,
        preconditioner=preconditioner,
        used=used,
    )
    if used is not None:
        used.zero_()
        for source in uplink.chunks[server].pieces:
            sent = [
                (_raw(source, row, dtype) if source.raw else _scales(uplink, source, row)).any()
                for row in payloads
            ]
            used[source.slot] = any(map(bool, sent))
    pieces = zip(uplink.chunks[server].pieces, downlink.chunks[server].pieces, strict=True)
    for source, target in pieces:
        mean = torch.zeros(source.numel, dtype=compute_dtype(dtype), device=payloads.device)
        for worker in payloads:
            mean += _decode_piece(uplink, source, worker, dtype, divisor=len(payloads))
        factor = _divisor(uplink, source, preconditioner)
        if factor is not None:
            mean = _limit(mean * factor)
        here = slice(target.local, target.local + target.numel)
        error = None if residual is None or _is_unused(target, used) else residual[here]
        divisor = _divisor(downlink, target, preconditioner)
        _encode_piece(downlink, target, mean, error, dtype, payload, divisor)


def decode(
    wire: Wire,
    payload: Tensor,
    out: Tensor,
    dtype: torch.dtype,
    *,
    preconditioner: Preconditioner | None = None,
) -> None:
    """Dequantize a payload into ``out``.

    Args:
        wire: The downlink's layout.
        payload: ``[servers, stride_bytes]`` uint8.
        out: ``[numel]``, any floating dtype, overwritten.
        dtype: The dtype in which raw elements travel; float64 makes the arithmetic float64.
        preconditioner: Second moments by whose root blocks were divided.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, a device or a memory layout is wrong.
    """
    check_arguments(wire, dtype, bucket=out, payload=payload, preconditioner=preconditioner)
    for chunk, source in zip(wire.chunks, payload, strict=True):
        for piece in chunk.pieces:
            here = slice(piece.start, piece.start + piece.numel)
            values = _decode_piece(wire, piece, source, dtype)
            divisor = _divisor(wire, piece, preconditioner)
            out[here] = (values if divisor is None else _limit(values * divisor)).to(out.dtype)


def _is_unused(piece: Piece, used: Tensor | None) -> bool:
    return used is not None and not bool(used[piece.slot])


class _Moments:
    """The moments of one piece, and their next values, which are stored if they are finite."""

    def __init__(self, adam: AdamSource, piece: Piece) -> None:
        here = slice(piece.start, piece.start + piece.numel)
        self.exp_avg, self.exp_avg_sq = adam.exp_avg[here], adam.exp_avg_sq[here]
        self.terms = adam.terms[piece.slot].to(self.exp_avg.device, self.exp_avg.dtype)
        self.next_exp_avg, self.next_exp_avg_sq = self.exp_avg, self.exp_avg_sq

    def update(self, g: Tensor) -> Tensor:
        """Return the update for the gradient ``g``, by the formulas of :class:`AdamSource`."""
        beta1, rest1, beta2, rest2, step_size, correction, eps = self.terms.unbind()
        v = self.exp_avg_sq * beta2 + (g * g) * rest2
        m = self.exp_avg * beta1 + g * rest1
        self.next_exp_avg, self.next_exp_avg_sq = m, v
        numerator = m * step_size
        denominator = exact_sqrt(v) * correction + eps
        nothing = (numerator == 0) & (denominator == 0)
        return torch.where(nothing, 0.0, numerator / denominator)

    def keep(self, first: int, last: int, finite: Tensor) -> None:
        """Store the next values of ``[first, last)`` for which ``finite``, bool, is True."""
        m, v = self.exp_avg[first:last], self.exp_avg_sq[first:last]
        m.copy_(torch.where(finite, self.next_exp_avg[first:last], m))
        v.copy_(torch.where(finite, self.next_exp_avg_sq[first:last], v))


def _divisor(wire: Wire, piece: Piece, preconditioner: Preconditioner | None) -> Tensor | None:
    """Return the divisor of a piece, ``[numel]``, see :class:`Preconditioner`; None without one."""
    moment = None if preconditioner is None else preconditioner.second_moments[piece.slot]
    if moment is None or piece.raw:
        return None
    v = moment[piece.offset : piece.offset + piece.numel]
    parts = []
    for first, last, count in _runs(piece.numel, wire.block_size):
        block = v[first:last].view(count, -1)
        floor = lane_sum(block) / block.shape[1] * 1e-3
        usable = (floor >= torch.finfo(v.dtype).tiny) & torch.isfinite(floor)
        parts.append(torch.where(usable, exact_sqrt(block + floor), 1.0).flatten())
    return torch.cat(parts)


def _largest(dtype: torch.dtype) -> float:
    """Return the magnitude at which results saturate: the largest bfloat16 in float32 arithmetic."""
    return float(torch.finfo(torch.float64 if dtype == torch.float64 else torch.bfloat16).max)


def _limit(x: Tensor) -> Tensor:
    """Clamp to the largest magnitude; NaN remains NaN."""
    largest = _largest(x.dtype)
    return x.clamp(-largest, largest)


def _saturate(x: Tensor, finite: Tensor) -> Tensor:
    """Clamp the infinities of results whose operand was finite, that is of overflows."""
    return torch.where(torch.isinf(x) & finite, _limit(x), x)


def _runs(numel: int, block_size: int) -> list[tuple[int, int, int]]:
    """Return first element, end and number of blocks: of all full blocks, and of the partial one."""
    full = numel // block_size * block_size
    runs = ((0, full, numel // block_size), (full, numel, 1))
    return [run for run in runs if run[0] < run[1]]


def _encode_piece(
    wire: Wire,
    piece: Piece,
    values: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    out: Tensor,
    divisor: Tensor | None = None,
    moments: _Moments | None = None,
) -> None:
    if piece.raw:
        if moments is not None:
            finite = torch.isfinite(values) & torch.isfinite(moments.next_exp_avg_sq)
            moments.keep(0, piece.numel, finite)
            values = torch.where(finite, values, float("nan"))
        _raw(piece, out, dtype).copy_(values)
        return
    total = values.to(compute_dtype(dtype))
    if residual is not None:
        total = _saturate(total + residual, torch.isfinite(total))
    scaled = total if divisor is None else _saturate(total / divisor, torch.isfinite(total))
    if moments is not None:
        # An infinite v makes an update of zero, which must not count as finite.
        scaled = torch.where(torch.isfinite(moments.next_exp_avg_sq), scaled, float("inf"))
    size = wire.block_size
    scales = _scales(wire, piece, out)
    codes_at = piece.data_at
    for first, last, count in _runs(piece.numel, size):
        block = scaled[first:last].view(count, -1)
        scale, codes, decoded, finite = quantize(block, wire.quantizer, wire.scale_rule)
        packed = pack(codes, wire.quantizer)
        scales[first // size : first // size + count] = scale
        out[codes_at : codes_at + packed.numel()] = packed.flatten()
        codes_at += packed.numel()
        finite = finite.expand(block.shape).flatten()
        if residual is not None:
            sent = decoded.flatten()
            if divisor is not None:
                sent = _limit(sent * divisor[first:last])
            kept = residual[first:last]
            kept.copy_(torch.where(finite, total[first:last] - sent, kept))
        if moments is not None:
            moments.keep(first, last, finite)


def _decode_piece(
    wire: Wire, piece: Piece, payload: Tensor, dtype: torch.dtype, divisor: int = 1
) -> Tensor:
    """Decode one piece to the dtype of the arithmetic; scales or raw values divided by ``divisor``."""
    compute = compute_dtype(dtype)
    if piece.raw:
        return _raw(piece, payload, dtype).to(compute) / divisor
    quantizer, size = wire.quantizer, wire.block_size
    levels = torch.tensor(quantizer.levels, dtype=compute, device=payload.device)
    scales = _scales(wire, piece, payload).to(compute) / divisor
    at = piece.data_at
    parts = []
    for first, last, count in _runs(piece.numel, size):
        numel = (last - first) // count
        code_bytes = quantizer.code_bytes(numel)
        codes = payload[at : at + count * code_bytes].view(count, -1)
        at += count * code_bytes
        scale = scales[first // size : first // size + count, None]
        parts.append((scale * levels[unpack(codes, numel, quantizer)]).flatten())
    return torch.cat(parts)


def _raw(piece: Piece, payload: Tensor, dtype: torch.dtype) -> Tensor:
    return payload[piece.data_at : piece.data_at + piece.numel * dtype.itemsize].view(dtype)


def _scales(wire: Wire, piece: Piece, payload: Tensor) -> Tensor:
    blocks = -(-piece.numel // wire.block_size)
    at = piece.scales_at
    return payload[at : at + blocks * SCALE_BYTES].view(torch.bfloat16)
