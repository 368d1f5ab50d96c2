"""The three kernels for CUDA in Triton, fused: one pass over memory, several blocks a program.

A program holds its blocks as a tile whose rows are the planes of the packing (see
:mod:`effadam_hook.kernels.triton_kernels.tile`). Decoding is bit-identical to
:mod:`effadam_hook.kernels.reference`. Encoding uses another order of summation, so that a scale may
differ by one unit in the last place of bfloat16, and with it a code at a threshold; all
implementations decode a payload to the same values.

The modules of kernels do not postpone the evaluation of annotations: the interpreter of Triton 3.0 and
3.1 compares the annotations of constants themselves.

After the first call for a wire, calls neither wait for the device nor allocate memory on it: a table of
the positions of all tiles remains on the device, and launches go to the current stream.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from effadam_hook.kernels.arguments import check_arguments
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.kernels.triton_kernels.constants import (
    decode_constants,
    encode_constants,
    marking_constants,
    reduce_constants,
    warps_of,
)
from effadam_hook.kernels.triton_kernels.decode import decode_kernel
from effadam_hook.kernels.triton_kernels.encode import encode_kernel
from effadam_hook.kernels.triton_kernels.reduce import reduce_encode_kernel
from effadam_hook.kernels.triton_kernels.table import table_of
from effadam_hook.kernels.triton_kernels.unused import (
    mark_used_input_kernel,
    mark_used_mean_kernel,
)
from effadam_hook.kernels.upload import upload
from effadam_hook.wire.layout import Wire

__all__ = ["decode", "encode_", "name", "reduce_encode_"]

name = "triton"

_addresses: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
_ADDRESSES_KEPT = 1024
_terms: WeakKeyDictionary[AdamSource, Tensor] = WeakKeyDictionary()


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
    """Quantize ``x + residual``; see :func:`effadam_hook.kernels.reference.encode_`."""
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
    table = table_of(wire, x.device, None)
    if table.tiles == 0:
        return
    if residual is None:
        used = None
    constants = encode_constants(wire, dtype)
    with _on(x.device):
        if used is not None:
            used.zero_()
            mark_used_input_kernel[(table.tiles,)](
                *(x, used, table.owner, table.pieces), **marking_constants(constants), num_warps=1
            )
        encode_kernel[(table.tiles,)](
            x,
            residual,
            payload,
            table.owner,
            table.pieces,
            _moments_of(preconditioner, x.device),
            None if adam is None else adam.exp_avg,
            None if adam is None else adam.exp_avg_sq,
            None if adam is None else _terms_of(adam, x.device),
            used,
            **constants,
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
    used: Tensor | None = None,
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
        used=used,
    )
    device = payload.device
    source, target = table_of(uplink, device, server), table_of(downlink, device, server)
    if target.tiles == 0:
        return
    if residual is None:
        used = None
    constants = reduce_constants(uplink, downlink, dtype)
    with _on(device):
        if used is not None:
            used.zero_()
            mark_used_mean_kernel[(target.tiles,)](
                *(payloads, payloads.shape[0], payloads.shape[1], used),
                *(target.owner, source.pieces, target.pieces),
                **marking_constants(constants, raw=True),
                num_warps=1,
            )
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
            used,
            **constants,
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


def _terms_of(adam: AdamSource, device: torch.device) -> Tensor:
    """Copy the terms of a step to the device, into the same memory at every step."""
    if device.type != "cuda":
        return adam.terms
    if adam not in _terms:
        _terms[adam] = torch.empty_like(adam.terms, device=device)
    return upload(adam.terms, device, _terms[adam])


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
        _addresses[key] = upload(torch.tensor(found, dtype=torch.int64, device="cpu"), device)
    return _addresses[key]
