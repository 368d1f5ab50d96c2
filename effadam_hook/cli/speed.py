"""Measures what the arithmetic takes here, with all ranks of this machine at it at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effadam_hook.cost import Speed
from effadam_hook.exchange.probe import Probe
from effadam_hook.kernels import select
from effadam_hook.kernels.sources import AdamSource
from effadam_hook.layout import Slot, plan_bucket
from effadam_hook.quantizers import get_quantizer
from effadam_hook.scheme import Scheme

__all__ = ["measure_speed"]

_NUMEL = 1 << 20
_FEW, _MANY = 2, 6
_TINY = 256
_ADAM = (0.9, 0.1, 0.999, 0.001, 1e-3, 1.0, 1e-8)


def measure_speed(probe: Probe, scheme: Scheme, device: torch.device) -> Speed:
    """Time a scheme's arithmetic; a collective operation.

    Args:
        probe: The ranks.
        scheme: How gradients are averaged.
        device: Where they are.

    Returns:
        Its speed, with the other ranks of this machine as busy as this one.
    """
    if scheme.kind in ("none", "dense"):
        return Speed()
    if scheme.kind == "cast":
        return _cast(probe, scheme, device)
    if scheme.kind == "powersgd":
        return _powersgd(probe, scheme.rank, device)
    return _quantized(probe, scheme, device)


def _cast(probe: Probe, scheme: Scheme, device: torch.device) -> Speed:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[scheme.quantizer]
    bucket = torch.randn(_NUMEL, device=device)
    cast = bucket.to(dtype)
    before_s = probe.time_busy(lambda: _discard(bucket.to(dtype).div_(2)))
    after_s = probe.time_busy(lambda: _discard(bucket.copy_(cast)))
    return Speed(encode_s=before_s / _NUMEL, decode_s=after_s / _NUMEL)


def _powersgd(probe: Probe, rank: int, device: torch.device) -> Speed:
    """The three products and the passes over memory that torch's hook makes of a square matrix."""
    side = int(_NUMEL**0.5)
    matrix, error = torch.randn(side, side, device=device), torch.zeros(side, side, device=device)
    p, q = torch.randn(side, rank, device=device), torch.randn(side, rank, device=device)

    def before() -> None:
        matrix.add_(error)
        error.copy_(matrix)
        torch.mm(matrix, q, out=p)
        torch.linalg.qr(p)
        torch.mm(matrix.t(), p, out=q)

    def after() -> None:
        torch.mm(p, q.t(), out=matrix)
        torch.sub(error, matrix, out=error)
        matrix.mul_(1e-3)

    return Speed(
        encode_s=probe.time_busy(before) / _NUMEL, decode_s=probe.time_busy(after) / _NUMEL
    )


def _quantized(probe: Probe, scheme: Scheme, device: torch.device) -> Speed:
    quantizer = get_quantizer(scheme.quantizer)
    kernels = select(device)

    def calls(numel: int, workers: int) -> dict[str, Callable[[], None]]:
        layout = plan_bucket(
            [Slot("weight", 0, 0, numel, False)],
            uplink=quantizer,
            downlink=quantizer,
            scale_rule="least_squares",
            block_size=256,
            servers=1,
            itemsize=4,
        )
        x = torch.randn(numel, device=device)
        worker, server, out = (torch.zeros_like(x) for _ in range(3))
        stride = layout.uplink.stride_bytes
        sent = torch.zeros(1, stride, dtype=torch.uint8, device=device)
        adam = _adam(x) if scheme.kind == "update" else None

        def encode() -> None:
            kernels.encode_(layout.uplink, x, worker, sent, torch.float32, adam=adam)

        encode()
        received = sent.repeat(workers, 1)
        outgoing = torch.zeros_like(sent[0])

        def reduce() -> None:
            kernels.reduce_encode_(
                layout.uplink, layout.downlink, 0, received, server, torch.float32, outgoing
            )

        def decode() -> None:
            kernels.decode(layout.downlink, sent, out, torch.float32)

        return {"encode": encode, "reduce": reduce, "decode": decode}

    few, many = calls(_NUMEL, _FEW), calls(_NUMEL, _MANY)
    call_s = probe.time_busy(calls(_TINY, _FEW)["encode"])
    reduce_few_s = probe.time_busy(few["reduce"])
    reduce_many_s = probe.time_busy(many["reduce"])
    each_s = max(0.0, reduce_many_s - reduce_few_s) / (_MANY - _FEW)
    return Speed(
        encode_s=probe.time_busy(few["encode"]) / _NUMEL,
        reduce_s=max(0.0, reduce_few_s - _FEW * each_s) / _NUMEL,
        reduce_payload_s=each_s / _NUMEL,
        decode_s=probe.time_busy(few["decode"]) / _NUMEL,
        call_s=call_s,
    )


def _adam(x: Tensor) -> AdamSource:
    terms = torch.tensor([_ADAM], dtype=torch.float64)
    return AdamSource(torch.zeros_like(x), torch.ones_like(x), terms)


def _discard(_: Tensor) -> None:
    pass
