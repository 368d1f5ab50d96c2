"""Quantization of blocks in plain torch, the definition of every scale and code.

Steps [1] to [4] are those of :mod:`effadam_hook.wire.quantizers`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effadam_hook.wire.quantizers import Quantizer

__all__ = ["exact_sqrt", "lane_sum", "pack", "quantize", "unpack"]

_LANES = 16
_TINY = 2.0**-100


def quantize(
    x: Tensor, quantizer: Quantizer, scale_rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize blocks.

    Args:
        x: ``[blocks, n]``, float32 or float64.
        quantizer: The quantizer.
        scale_rule: ``"least_squares"`` or ``"absmax"``.

    Returns:
        Scales ``[blocks]`` bfloat16, codes ``[blocks, n]`` int64, decoded values ``[blocks, n]``, and
        ``[blocks, 1]`` bool, True for blocks that are finite.
    """
    magnitudes = torch.tensor(quantizer.magnitudes, dtype=x.dtype, device=x.device)
    top = quantizer.magnitudes[-1]
    largest = x.abs().amax(dim=1, keepdim=True)
    finite = torch.isfinite(largest)
    empty = largest < _TINY
    x = torch.where(finite & ~empty, x, 1.0)
    largest = torch.where(finite & ~empty, largest, 1.0)

    # [1] The exponent is limited so that its reciprocal is a normal number too.
    limit = 126 if x.dtype == torch.float32 else 1022
    exponent = (torch.frexp(largest).exponent - 1).clamp(max=limit)
    power = torch.ldexp(torch.ones_like(largest), exponent)
    y = x * (1 / power)

    # [2]
    if quantizer.spread is None or scale_rule == "absmax":
        provisional = (largest * (1 / power)) / top
    else:
        provisional = exact_sqrt(lane_sum(y * y) / x.shape[1]) * quantizer.spread

    # [3]
    ratio = y.abs() * (1 / provisional)
    thresholds = torch.tensor(quantizer.thresholds, dtype=x.dtype, device=x.device)
    index = torch.bucketize(ratio, thresholds)
    q = torch.where(y < 0, -magnitudes[index], magnitudes[index])
    gap = 0 if quantizer.has_zero else 1
    middle = len(magnitudes) - 1 + gap
    codes = torch.where(y < 0, middle - gap - index, middle + index)

    # [4]
    scale = provisional if scale_rule == "absmax" else lane_sum(y * q) / lane_sum(q * q)
    scale = scale * power
    rounded = scale.clamp(max=quantizer.largest_scale).to(torch.float32).to(torch.bfloat16)
    rounded = torch.where(empty, torch.zeros_like(rounded), rounded)
    decoded = rounded.to(x.dtype) * q
    codes = torch.where(finite & ~empty, codes, torch.zeros_like(codes))
    rounded = torch.where(finite, rounded, torch.full_like(rounded, float("nan")))
    return rounded[:, 0], codes, decoded, finite


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root; torch's float32 one is not always exact with MKL."""
    if x.dtype == torch.float32:
        return x.to(torch.float64).sqrt().to(torch.float32)
    if x.device.type != "cpu":
        return x.sqrt()
    return x.clone().apply_(lambda value: math.sqrt(value) if value >= 0 else math.nan)


def lane_sum(x: Tensor) -> Tensor:
    """Sum the rows of ``[blocks, n]`` to ``[blocks, 1]``, in the order that defines the result."""
    padding = -x.shape[1] % _LANES
    rows = torch.nn.functional.pad(x, (0, padding)).view(x.shape[0], -1, _LANES)
    lanes = rows[:, 0]
    for row in rows.unbind(1)[1:]:
        lanes = lanes + row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def pack(codes: Tensor, quantizer: Quantizer) -> Tensor:
    """Pack codes ``[blocks, n]`` into bytes ``[blocks, code_bytes(n)]``."""
    blocks, numel = codes.shape
    columns = -(-numel // quantizer.planes)
    padding = columns * quantizer.planes - numel
    planes = torch.nn.functional.pad(codes, (0, padding)).view(blocks, quantizer.planes, columns)
    word = (planes * _weights(quantizer, codes.device)).sum(dim=1)
    return torch.cat(
        [(word >> (8 * byte)) & 255 for byte in range(quantizer.plane_bytes)], dim=1
    ).to(torch.uint8)


def unpack(packed: Tensor, numel: int, quantizer: Quantizer) -> Tensor:
    """Unpack codes ``[blocks, numel]`` as int64; the inverse of :func:`pack`."""
    columns = -(-numel // quantizer.planes)
    rows = packed.to(torch.int64).view(len(packed), quantizer.plane_bytes, columns)
    word = rows[:, 0]
    for byte in range(1, quantizer.plane_bytes):
        word = word | (rows[:, byte] << (8 * byte))
    # Floor division and modulo: a word of eight 8-bit codes may have the sign bit set.
    planes = (word[:, None] // _weights(quantizer, packed.device)) % _base(quantizer)
    return planes.reshape(len(packed), -1)[:, :numel]


def _base(quantizer: Quantizer) -> int:
    return 3 if quantizer.planes == 5 else 2**quantizer.plane_bytes


def _weights(quantizer: Quantizer, device: torch.device) -> Tensor:
    """Return the weight of a code in its column's word, by plane: ``[planes, 1]``."""
    base = _base(quantizer)
    powers = [base**plane for plane in range(quantizer.planes)]
    return torch.tensor(powers, device=device)[:, None]
