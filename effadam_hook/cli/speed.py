"""Measures what the arithmetic takes here, with all ranks of this machine at it at once."""

from __future__ import annotations

import torch
from torch import Tensor

from effadam_hook.cost import Speed
from effadam_hook.exchange.probe import Probe
from effadam_hook.kernels import select
from effadam_hook.kernels.sources import AdamSource
from effadam_hook.layout import Slot, plan_bucket
from effadam_hook.quantizers import get_quantizer
from effadam_hook.scheme import Scheme
from effadam_hook.state import EfficientAdamState

__all__ = ["measure_speed"]

_NUMEL = 1 << 20
_FEW, _MANY = 2, 6
_SETS = 8
_TINY = 256
_BUCKETS = 32
_KERNELS = 3
_ADAM = (0.9, 0.1, 0.999, 0.001, 1e-3, 1.0, 1e-8)


def measure_speed(
    probe: Probe, scheme: Scheme, device: torch.device, sharing: float = 1.0
) -> Speed:
    """Time a scheme's arithmetic; a collective operation.

    Args:
        probe: The ranks.
        scheme: How gradients are averaged.
        device: Where they are.
        sharing: Ranks that share a core.

    Returns:
        Its speed, with the other ranks of this machine as busy as this one.
    """
    if scheme.kind in ("none", "dense"):
        return Speed()
    if scheme.kind == "cast":
        return _cast(probe, scheme, device)
    if scheme.kind == "powersgd":
        return _powersgd(probe, scheme.rank, device)
    return _quantized(probe, scheme, device, sharing)


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


def _quantized(probe: Probe, scheme: Scheme, device: torch.device, sharing: float) -> Speed:
    few, many = _Calls(scheme, device, _FEW), _Calls(scheme, device, _MANY)
    reduce_few_s, reduce_many_s = probe.time_busy(few.reduce), probe.time_busy(many.reduce)
    each_s = max(0.0, reduce_many_s - reduce_few_s) / (_MANY - _FEW)
    return Speed(
        encode_s=probe.time_busy(few.encode) / _NUMEL,
        reduce_s=max(0.0, reduce_few_s - _FEW * each_s) / _NUMEL,
        reduce_payload_s=each_s / _NUMEL,
        decode_s=probe.time_busy(few.decode) / _NUMEL,
        call_s=_call_s(probe, scheme, device, sharing),
    )


class _Calls:
    """The kernels, at every call on other memory: a model is too large to stay in the caches."""

    def __init__(
        self, scheme: Scheme, device: torch.device, workers: int, numel: int = _NUMEL
    ) -> None:
        quantizer = get_quantizer(scheme.quantizer)
        self._kernels = select(device)
        self._layout = plan_bucket(
            [Slot("weight", 0, 0, numel, False)],
            uplink=quantizer,
            downlink=quantizer,
            scale_rule="least_squares",
            block_size=256,
            servers=1,
            itemsize=4,
        )
        stride = self._layout.uplink.stride_bytes
        self._x = torch.randn(_SETS, numel, device=device)
        self._worker, self._server, self._out = (torch.zeros_like(self._x) for _ in range(3))
        self._sent = torch.zeros(_SETS, 1, stride, dtype=torch.uint8, device=device)
        self._adam = [_adam(x) if scheme.kind == "update" else None for x in self._x]
        self._turn = 0
        for _ in range(_SETS):
            self.encode()
        self._received = self._sent.repeat(1, workers, 1)
        self._outgoing = torch.zeros_like(self._sent)

    def _next(self) -> int:
        self._turn = (self._turn + 1) % _SETS
        return self._turn

    def encode(self) -> None:
        """What a worker does before the uplink."""
        i = self._next()
        self._kernels.encode_(
            self._layout.uplink,
            self._x[i],
            self._worker[i],
            self._sent[i],
            torch.float32,
            adam=self._adam[i],
        )

    def reduce(self) -> None:
        """What a server does."""
        i = self._next()
        self._kernels.reduce_encode_(
            self._layout.uplink,
            self._layout.downlink,
            0,
            self._received[i],
            self._server[i],
            torch.float32,
            self._outgoing[i, 0],
        )

    def decode(self) -> None:
        """What a worker does after the downlink."""
        i = self._next()
        self._kernels.decode(self._layout.downlink, self._sent[i], self._out[i], torch.float32)


def _call_s(probe: Probe, scheme: Scheme, device: torch.device, sharing: float) -> float:
    """What a part takes whatever its size, for each of the three kernels."""
    if device.type != "cpu":  # threads, hand-overs and messages are no work for the device
        return probe.time_busy(_Calls(scheme, device, _FEW, _TINY).encode)
    state = EfficientAdamState(quantizer=scheme.quantizer, topology=scheme.topology)
    parameters = [torch.zeros(_TINY) for _ in range(_BUCKETS)]
    buffers = [torch.zeros(_TINY) for _ in range(_BUCKETS)]

    def exchange() -> None:
        last = _BUCKETS - 1
        futures = [
            state.run_bucket(index, buffer, [parameter], index == last)
            for index, (buffer, parameter) in enumerate(zip(buffers, parameters, strict=True))
        ]
        torch.futures.wait_all(futures)

    try:
        return sharing * probe.time_processor(exchange) / _BUCKETS / _KERNELS
    finally:
        state.close()


def _adam(x: Tensor) -> AdamSource:
    terms = torch.tensor([_ADAM], dtype=torch.float64)
    return AdamSource(torch.zeros_like(x), torch.ones_like(x), terms)


def _discard(_: Tensor) -> None:
    pass
