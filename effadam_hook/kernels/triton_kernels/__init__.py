"""The three kernels for CUDA in Triton, fused: one pass over memory, several blocks a program.

A program holds its blocks as a tile whose rows are the planes of the packing (see
:mod:`effadam_hook.kernels.triton_kernels.tile`). Decoding is bit-identical to
:mod:`effadam_hook.kernels.reference`. Encoding uses another order of summation, so that a scale may
differ by one unit in the last place of bfloat16, and with it a code at a threshold; all
implementations decode a payload to the same values.

After the first call for a wire, calls neither wait for the device nor allocate memory on it: a table of
the positions of all tiles remains on the device, and launches go to the current stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effadam_hook.kernels.arguments import check_arguments
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.kernels.triton_kernels.constants import (
    decode_constants,
    encode_constants,
    reduce_constants,
    warps_of,
)
from effadam_hook.kernels.triton_kernels.decode import decode_kernel
from effadam_hook.kernels.triton_kernels.encode import encode_kernel
from effadam_hook.kernels.triton_kernels.reduce import reduce_encode_kernel
from effadam_hook.kernels.triton_kernels.table import table_of
from effadam_hook.wire.layout import Wire

__all__ = ["decode", "encode_", "name", "reduce_encode_"]

name = "triton"

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
    table = table_of(wire, x.device, None)
    if table.tiles == 0:
        return
    terms = None
    if adam is not None:
        terms = adam.terms.pin_memory() if x.is_cuda else adam.terms
        terms = terms.to(x.device, non_blocking=True)
    with _on(x.device):
        encode_kernel[(table.tiles,)](
            x,
            residual,
            payload,
            table.owner,
            table.pieces,
            _moments_of(preconditioner, x.device),
            None if adam is None else adam.exp_avg,
            None if adam is None else adam.exp_avg_sq,
            terms,
            **encode_constants(wire, dtype),
            num_warps=warps_of(x.device),
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
    source, target = table_of(uplink, device, server), table_of(downlink, device, server)
    if target.tiles == 0:
        return
    with _on(device):
        reduce_encode_kernel[(target.tiles,)](
            payloads,
            payloads.shape[0],
            payloads.shape[1],
            residual,
            payload,
            target.owner,
            source.pieces,
            target.pieces,
            _moments_of(preconditioner, device),
            **reduce_constants(uplink, downlink, dtype),
            num_warps=warps_of(device),
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
    table = table_of(wire, out.device, None)
    if table.tiles == 0:
        return
    with _on(out.device):
        decode_kernel[(table.tiles,)](
            payload,
            out,
            table.owner,
            table.pieces,
            _moments_of(preconditioner, out.device),
            **decode_constants(wire, dtype),
            num_warps=warps_of(out.device),
        )


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device if device.type == "cuda" else -1)


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
