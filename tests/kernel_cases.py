"""Layouts, inputs and comparisons that the kernels' tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from effadam_hook.kernels import Kernels, cpu, reference
from effadam_hook.wire.layout import BucketLayout, Slot, Wire, lay_out_bucket
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_RULES, get_quantizer

SIZES = (1, 2, 5, 15, 16, 17, 0, 255, 256, 257, 1000, 40, 3)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMBINATIONS = [(name, rule) for name in QUANTIZERS for rule in SCALE_RULES]
POISON = 255

try:
    LIBRARY = cpu.load()
    VARIANTS = cpu.CpuKernels(LIBRARY).variants
except ImportError:
    LIBRARY, VARIANTS = None, ()

needs_library = pytest.mark.skipif(LIBRARY is None, reason="the C kernels are not built")


def compiled(variant: str | None = None) -> cpu.CpuKernels:
    assert LIBRARY is not None
    return cpu.CpuKernels(LIBRARY, variant)


IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    *(pytest.param(compiled(variant), id=variant) for variant in VARIANTS),
]


def layout_of(
    sizes: Sequence[int],
    quantizer: str,
    downlink: str | None = None,
    rule: str = "least_squares",
    block_size: int = 256,
    servers: int = 1,
    dtype: torch.dtype = torch.float32,
    exact: Sequence[int] = (),
) -> BucketLayout:
    slots, start = [], 0
    for index, numel in enumerate(sizes):
        slots.append(Slot(f"p{index}", start, numel, index in exact))
        start += numel
    return lay_out_bucket(
        slots,
        uplink=get_quantizer(quantizer),
        downlink=get_quantizer(downlink or quantizer),
        scale_rule=rule,
        block_size=block_size,
        servers=servers,
        itemsize=dtype.itemsize,
    )


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def values_like_gradients(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy tails and several orders of magnitude."""
    return (torch.randn(numel) * torch.rand(numel) ** 4).to(dtype)


def encode(
    kernels: Kernels,
    wire: Wire,
    x: Tensor,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **sources: Any,
) -> Tensor:
    """A payload that was full of garbage before."""
    shape = (len(wire.chunks), wire.stride_bytes)
    payload = torch.full(shape, POISON, dtype=torch.uint8, device=x.device)
    kernels.encode_(wire, x, residual, payload, dtype or x.dtype, **sources)
    return payload


def decode(
    kernels: Kernels,
    wire: Wire,
    payload: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
    **sources: Any,
) -> Tensor:
    """A result that was full of NaN before."""
    shape = (wire.numel,)
    out = torch.full(shape, float("nan"), dtype=out_dtype or dtype, device=payload.device)
    kernels.decode(wire, payload, out, dtype, **sources)
    return out


def reduce_encode(
    kernels: Kernels,
    layout: BucketLayout,
    server: int,
    payloads: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    **sources: Any,
) -> Tensor:
    shape = (layout.downlink.stride_bytes,)
    payload = torch.full(shape, POISON, dtype=torch.uint8, device=payloads.device)
    kernels.reduce_encode_(
        layout.uplink, layout.downlink, server, payloads, residual, dtype, payload, **sources
    )
    return payload


def round_trip(
    kernels: Kernels,
    layout: BucketLayout,
    workers: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    server_residuals: Sequence[Tensor | None],
    dtype: torch.dtype,
    **sources: Any,
) -> dict[str, Tensor]:
    """The whole exchange in one process; residuals change in place. Returns all that was made."""
    sent = [
        encode(kernels, layout.uplink, x, e, dtype, **sources)
        for x, e in zip(workers, residuals, strict=True)
    ]
    chunks = []
    for server, residual in enumerate(server_residuals):
        gathered = torch.stack([payload[server] for payload in sent])
        chunks.append(reduce_encode(kernels, layout, server, gathered, residual, dtype, **sources))
    downlink = torch.stack(chunks)
    out = decode(kernels, layout.downlink, downlink, dtype, workers[0].dtype, **sources)
    made = {f"uplink {i}": payload for i, payload in enumerate(sent)}
    made |= {f"residual {i}": e for i, e in enumerate(residuals) if e is not None}
    made |= {f"server residual {i}": e for i, e in enumerate(server_residuals) if e is not None}
    return made | {"downlink": downlink, "out": out}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To the bit, where any NaN equals any other."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        places = int((value != b[name]).sum())
        assert same(value, b[name]), f"{name} differs in {places} places"


def same(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        a, b = a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0)
    return torch.equal(a, b)
