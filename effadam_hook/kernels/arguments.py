"""Checks of the arguments that all implementations of the kernels share."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from effadam_hook.kernels.fusions import ADAM_TERMS, AdamSource, Preconditioner
from effadam_hook.wire.layout import Wire

__all__ = ["check_arguments", "compute_dtype"]

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic, of residuals and of moments.

    Args:
        dtype: The dtype of a parameter, or in which raw elements travel.

    Returns:
        float64 for float64, float32 otherwise.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    used: Tensor | None = None,
) -> None:
    """Check the arguments of a kernel, which reads and writes memory without further checks.

    Args:
        wire: Layout of ``payload``.
        dtype: The dtype in which raw elements travel.
        payload: ``[servers, stride_bytes]`` uint8; ``[stride_bytes]`` if ``server`` is given.
        bucket: ``[numel]``, any floating dtype.
        server: Index of the chunk that is reduced.
        uplink: Layout of ``payloads``.
        payloads: ``[world_size, stride_bytes]`` uint8.
        residual: ``[numel]``, or ``[chunk numel]`` if ``server`` is given, in :func:`compute_dtype`.
        preconditioner: See :class:`Preconditioner`.
        adam: See :class:`AdamSource`.
        used: ``[slots]`` int32.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, a device or a memory layout is wrong.
    """
    if dtype not in _FLOATING or dtype.itemsize != wire.itemsize:
        raise TypeError(
            f"Invalid dtype of raw elements: {dtype}. Must be a floating dtype of {wire.itemsize} "
            "bytes, the element size of the layout."
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
    if used is not None:
        slots = max(len(used), len(wire.slot_numels))
        _check("used", used, (torch.int32,), (slots,), device)
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
            f"{name}.contiguous(), or a contiguous buffer."
        )


_pairs: WeakKeyDictionary[Wire, WeakSet[Wire]] = WeakKeyDictionary()


def _check_pair(uplink: Wire, downlink: Wire) -> None:
    """Compare the pieces of two wires, once per pair: there may be hundreds of pieces."""
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
            f"Invalid length of second_moments: {len(moments)}. Must be {len(numels)}: one entry per "
            "slot of the bucket, None for a slot without second moments."
        )
    for slot, (moment, numel) in enumerate(zip(moments, numels, strict=False)):
        if moment is not None:
            _check(f"second_moments[{slot}]", moment, (compute,), (numel,), device)
