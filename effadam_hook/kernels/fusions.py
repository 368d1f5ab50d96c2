"""What the kernels can fuse with the quantizer, and the check of every argument they take.

Two things besides ``x + residual`` can be what is quantized:

- A :class:`Preconditioner` divides the blocks of a parameter by the root of its second moment, so that
  elements of small and of large gradients share a scale fairly, and multiplies back after decoding.
  Payloads are in preconditioned units, residuals in gradient units. All ranks must hold the same
  second moments.
- An :class:`AdamSource` turns the gradient into an Adam update and sends that.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from effadam_hook.wire.layout import Wire
from effadam_hook.wire.quantizers import Quantizer

__all__ = [
    "ADAM_TERMS",
    "TABLE_CODES",
    "AdamSource",
    "Preconditioner",
    "check_arguments",
    "compute_dtype",
    "level_table",
]

ADAM_TERMS = ("beta1", "1-beta1", "beta2", "1-beta2", "step_size", "inv_sqrt_correction2", "eps")
"""Columns of :attr:`AdamSource.terms`."""

TABLE_CODES = 16
"""Levels that fused kernels look up in a table; integer levels need none."""

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """Second moments to divide by, one per slot of the bucket.

    A block of the gradient ``g`` with the second moments ``v`` is quantized as ``g / d`` where
    ``d = sqrt(v + mean(v) / 1000)``; the floor keeps elements with a tiny ``v`` from deciding the
    scale. Where the floor is not a positive, normal, finite number, ``d = 1``. Raw pieces are not
    preconditioned.

    Attributes:
        second_moments: ``[parameter numel]`` each, contiguous, in the arithmetic's dtype, on the
            bucket's device; None leaves a slot as it is.
    """

    second_moments: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class AdamSource:
    """Moments that turn a gradient ``g`` into the update ``u`` that is quantized.

    With the terms of the slot::

        v = v * beta2 + (g * g) * (1 - beta2)
        m = m * beta1 + g * (1 - beta1)
        u = (m * step_size) / (sqrt(v) * inv_sqrt_correction2 + eps)

    with ``u = 0`` where numerator and denominator are 0. A block in which ``v`` or ``u + residual`` is
    not finite is sent as NaN and leaves its ``m``, ``v`` and residual as they were; in a raw piece this
    holds for each element.

    Attributes:
        exp_avg: ``[numel]``, ``m`` in the bucket's order and the arithmetic's dtype, updated in place.
        exp_avg_sq: ``[numel]``, ``v``, likewise.
        terms: ``[slots, 7]`` float64 on the CPU, contiguous, with the columns :data:`ADAM_TERMS`.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    terms: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic's dtype: float64 where raw elements are float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def level_table(quantizer: Quantizer) -> tuple[float, ...]:
    """Levels by code, for kernels that look them up.

    Args:
        quantizer: Any.

    Returns:
        At most :data:`TABLE_CODES` levels; none where levels are raw, or integers from 0, which codes
        yield by a subtraction.

    Raises:
        ValueError: If there are more.
    """
    levels = quantizer.levels
    if quantizer.magnitudes == tuple(range(len(quantizer.magnitudes))):
        return levels if len(levels) <= TABLE_CODES else ()
    if len(levels) > TABLE_CODES:
        raise ValueError(
            f"Invalid quantizer {quantizer.name!r}: it has {len(levels)} levels. Must be at most "
            f"{TABLE_CODES} for the fused kernels, unless its magnitudes are 0, 1, 2 and so on. Set "
            "EFFADAM_KERNELS=reference, which takes any number."
        )
    return levels


def check_arguments(
    wire: Wire,
    dtype: torch.dtype,
    *,
    payload: Tensor,
    bucket: Tensor | None = None,
    server: int | None = None,
    uplink: Wire | None = None,
    payloads: Tensor | None = None,
    residual: Tensor | None = None,
    preconditioner: Preconditioner | None = None,
    adam: AdamSource | None = None,
) -> None:
    """Check what a kernel is about to read and write without further checks.

    Args:
        wire: Layout of ``payload``.
        dtype: The dtype in which raw elements travel.
        payload: ``[servers, stride_bytes]`` uint8; ``[stride_bytes]`` if ``server`` is given.
        bucket: ``[numel]``, any floating dtype.
        server: Which chunk is reduced.
        uplink: Layout of ``payloads``.
        payloads: ``[world_size, stride_bytes]`` uint8.
        residual: ``[numel]``, or of the chunk if ``server`` is given, in the arithmetic's dtype.
        preconditioner: See :class:`Preconditioner`.
        adam: See :class:`AdamSource`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, a device or a memory layout is.
    """
    if dtype not in _FLOATING or dtype.itemsize != wire.itemsize:
        raise TypeError(
            f"Invalid dtype of raw elements: {dtype}. Must be a floating dtype of {wire.itemsize} "
            "bytes, for which the layout was made."
        )
    compute, device = compute_dtype(dtype), payload.device
    numel = wire.numel
    rows: tuple[int, ...] = (len(wire.chunks), wire.stride_bytes)
    if server is not None:
        if not 0 <= server < len(wire.chunks):
            raise ValueError(
                f"Invalid server: {server}. Must be from 0 to {len(wire.chunks) - 1}: the layout has "
                f"{len(wire.chunks)} chunks."
            )
        numel, rows = wire.chunks[server].numel, (wire.stride_bytes,)
    _check("payload", payload, (torch.uint8,), rows, device)
    if bucket is not None:
        _check("bucket", bucket, _FLOATING, (numel,), device)
    if residual is not None:
        _check("residual", residual, (compute,), (numel,), device)
    if payloads is not None and uplink is not None and server is not None:
        _check_pair(uplink, wire)
        shape = (max(1, len(payloads)), uplink.stride_bytes)
        _check("payloads", payloads, (torch.uint8,), shape, device)
    if preconditioner is not None:
        _check_moments(preconditioner, wire, compute, device)
    if adam is not None:
        if preconditioner is not None:
            raise ValueError(
                "Invalid preconditioner: an AdamSource sends updates, which need none."
            )
        _check("exp_avg", adam.exp_avg, (compute,), (numel,), device)
        _check("exp_avg_sq", adam.exp_avg_sq, (compute,), (numel,), device)
        slots = max(len(adam.terms), len(wire.slot_numels))
        shape = (slots, len(ADAM_TERMS))
        _check("terms", adam.terms, (torch.float64,), shape, torch.device("cpu"))


def _check(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"Invalid dtype of {name}: {tensor.dtype}. Must be {expected}.")
    if tensor.shape != shape:
        raise ValueError(f"Invalid shape of {name}: {tuple(tensor.shape)}. Must be {shape}.")
    if tensor.device != device:
        raise ValueError(f"Invalid device of {name}: {tensor.device}. Must be {device}.")
    if not tensor.is_contiguous():
        raise ValueError(
            f"Invalid strides of {name}: {tensor.stride()}. Must be contiguous: pass "
            f"{name}.contiguous(), or a buffer that is."
        )


_pairs: WeakKeyDictionary[Wire, WeakSet[Wire]] = WeakKeyDictionary()


def _check_pair(uplink: Wire, downlink: Wire) -> None:
    """Compare the pieces of two wires, once: there may be hundreds."""
    known = _pairs.setdefault(uplink, WeakSet())
    if downlink in known:
        return
    same = uplink.block_size == downlink.block_size and len(uplink.chunks) == len(downlink.chunks)
    same = same and all(
        [(p.local, p.numel, p.slot) for p in up.pieces]
        == [(p.local, p.numel, p.slot) for p in down.pieces]
        for up, down in zip(uplink.chunks, downlink.chunks, strict=True)
    )
    if not same:
        raise ValueError(
            "Invalid uplink: its pieces differ from the downlink's. Both must be of one BucketLayout."
        )
    known.add(downlink)


def _check_moments(
    preconditioner: Preconditioner, wire: Wire, compute: torch.dtype, device: torch.device
) -> None:
    moments, numels = preconditioner.second_moments, wire.slot_numels
    if len(moments) < len(numels):
        raise ValueError(
            f"Invalid second_moments: {len(moments)} of them. Must be {len(numels)}: one per slot of "
            "the bucket, None where there is none."
        )
    for slot, (moment, numel) in enumerate(zip(moments, numels, strict=False)):
        if moment is not None:
            _check(f"second_moments[{slot}]", moment, (compute,), (numel,), device)
