"""Measurement of a method's arithmetic, on all ranks of a machine concurrently."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from effadam_hook.config import Config
from effadam_hook.exchange.probe import Probe
from effadam_hook.exchange.staging import Staging
from effadam_hook.kernels import select
from effadam_hook.kernels.fusions import AdamSource
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Speed
from effadam_hook.session.node_buffers import NodeBuffers
from effadam_hook.session.session import ExchangeSession, exchange_all
from effadam_hook.wire.layout import BucketLayout, Slot, lay_out_bucket
from effadam_hook.wire.node_layout import lay_out_node
from effadam_hook.wire.quantizers import Quantizer, get_quantizer

__all__ = ["measure_speed"]

_NUMEL = 1 << 20
_FEW, _MANY = 2, 6
_SETS = 8
_TINY, _ROW = 256, 16
_BUCKETS = 8
_MOST_KERNELS = 4
_ADAM = (0.9, 0.1, 0.999, 0.001, 1e-3, 1.0, 1e-8)


def measure_speed(
    probe: Probe,
    method: Method,
    device: torch.device,
    cpu_s: Mapping[str, float],
    cpu_weight: float = 1.0,
    *,
    ranks_per_node: int = 1,
) -> Speed:
    """Time a method's arithmetic; a collective operation.

    Args:
        probe: The probe of the ranks.
        method: The method.
        device: Device of the gradients.
        cpu_s: Processor time of a rank for one nearly empty collective, by name of the leg; empty for
            the processor time of a kernel alone.
        cpu_weight: Seconds of computing that a second of processor time displaces, see
            :meth:`MeasuredLink.as_link <effadam_hook.planner.measure_link.MeasuredLink.as_link>`.
        ranks_per_node: Number of ranks of a node, for the node's mean of the hierarchical topology.

    Returns:
        The durations, measured while the other ranks of this machine do the same, and on memory that is
        not cached, as in training.
    """
    if method.kind in ("none", "dense"):
        return Speed()
    if method.kind == "cast":
        return _cast(probe, method, device)
    if method.kind == "powersgd":
        return _powersgd(probe, method.rank, device)
    legs = [leg for leg in cpu_s if leg.endswith(f"/{method.topology}")]
    if device.type == "cpu" and legs:
        part_s = _cpu_s_of_empty_part(probe, method) - sum(cpu_s[leg] for leg in legs)
        # One kernel more than transfers; nothing is computed before the gather in the node.
        call_s = cpu_weight * max(0.0, part_s) / min(len(legs) + 1, _MOST_KERNELS)
    else:
        call_s = probe.time_busy(_Calls(method, device, _TINY).encode)
    speed = _quantized(probe, method, device, call_s)
    if ranks_per_node == 1:
        return speed
    pack, average = _node_mean(device, ranks_per_node)
    return replace(
        speed, pack_s=probe.time_busy(pack) / _NUMEL, mean_s=probe.time_busy(average) / _NUMEL
    )


def _in_turn(sets: Tensor) -> Callable[[], Tensor]:
    """Return a function that cycles through the rows, so that caches do not hold the next one."""
    return itertools.cycle(sets).__next__


def _cast(probe: Probe, method: Method, device: torch.device) -> Speed:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[method.quantizer]
    buckets = torch.randn(_SETS, _NUMEL, device=device)
    bucket, cast = _in_turn(buckets), _in_turn(buckets.to(dtype))
    before_s = probe.time_busy(lambda: _discard(bucket().to(dtype).div_(2)))
    after_s = probe.time_busy(lambda: _discard(bucket().copy_(cast())))
    return Speed(encode_s=before_s / _NUMEL, decode_s=after_s / _NUMEL)


def _powersgd(probe: Probe, rank: int, device: torch.device) -> Speed:
    """Time the products and the passes over memory of torch's hook, on a square matrix."""
    side = int(_NUMEL**0.5)
    matrices = torch.randn(_SETS, side, side, device=device)
    next_matrix, next_error = _in_turn(matrices), _in_turn(torch.zeros_like(matrices))
    p, q = torch.randn(side, rank, device=device), torch.randn(side, rank, device=device)

    def before() -> None:
        matrix, error = next_matrix(), next_error()
        matrix.add_(error)
        error.copy_(matrix)
        torch.mm(matrix, q, out=p)
        torch.linalg.qr(p)
        torch.mm(matrix.t(), p, out=q)

    def after() -> None:
        matrix, error = next_matrix(), next_error()
        torch.mm(p, q.t(), out=matrix)
        torch.sub(error, matrix, out=error)
        matrix.mul_(1e-3)

    return Speed(
        encode_s=probe.time_busy(before) / _NUMEL, decode_s=probe.time_busy(after) / _NUMEL
    )


def _quantized(probe: Probe, method: Method, device: torch.device, call_s: float) -> Speed:
    calls = _Calls(method, device, _NUMEL)
    few_s = probe.time_busy(lambda: calls.reduce(_FEW))
    each_s = max(0.0, probe.time_busy(lambda: calls.reduce(_MANY)) - few_s) / (_MANY - _FEW)
    return Speed(
        encode_s=probe.time_busy(calls.encode) / _NUMEL,
        reduce_s=max(0.0, few_s - _FEW * each_s) / _NUMEL,
        reduce_payload_s=each_s / _NUMEL,
        decode_s=probe.time_busy(calls.decode) / _NUMEL,
        call_s=call_s,
    )


def _node_mean(device: torch.device, ranks: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return packing a bucket for the ranks of a node, and averaging this rank's share."""
    layout = _lay_out(_NUMEL, get_quantizer("lloyd4"), 2 * ranks, ranks)
    shares = lay_out_node(layout, ranks)
    dtypes, staging = (torch.float32, torch.float32), Staging(computes_on_host=False)
    sets = [NodeBuffers(shares, 0, *dtypes, device, staging) for _ in range(_SETS)]
    pack, average = itertools.cycle(sets).__next__, itertools.cycle(sets).__next__
    bucket = _in_turn(torch.randn(_SETS, _NUMEL, device=device))
    return lambda: pack().pack(bucket()), lambda: average().average()


def _lay_out(numel: int, quantizer: Quantizer, servers: int = 1, shares: int = 1) -> BucketLayout:
    return lay_out_bucket(
        [Slot("weight", 0, numel, False)],
        uplink=quantizer,
        downlink=quantizer,
        scale_rule="least_squares",
        block_size=256,
        servers=servers,
        itemsize=4,
        shares=shares,
    )


class _Calls:
    """Calls of the three kernels, each on other memory than the call before.

    Args:
        method: The method, which determines the quantizer and whether Adam updates are encoded.
        device: Device of the tensors.
        numel: Number of elements per call.
    """

    def __init__(self, method: Method, device: torch.device, numel: int) -> None:
        quantizer = get_quantizer(method.quantizer)
        self._kernels = select(device)
        self._layout = _lay_out(numel, quantizer)
        stride = self._layout.uplink.stride_bytes
        self._x = torch.randn(_SETS, numel, device=device)
        self._worker, self._server, self._out = (torch.zeros_like(self._x) for _ in range(3))
        self._sent = torch.zeros(_SETS, 1, stride, dtype=torch.uint8, device=device)
        self._adam = [_adam(x) if method.kind == "update" else None for x in self._x]
        self._turn = itertools.cycle(range(_SETS))
        for _ in range(_SETS):
            self.encode()
        self._received = self._sent.repeat(1, _MANY, 1)
        self._outgoing = torch.zeros_like(self._sent)

    def encode(self) -> None:
        """Encode on a worker, before the uplink."""
        i = next(self._turn)
        self._kernels.encode_(
            self._layout.uplink,
            self._x[i],
            self._worker[i],
            self._sent[i],
            torch.float32,
            adam=self._adam[i],
        )

    def reduce(self, workers: int) -> None:
        """Reduce the payloads of some workers on a server, and encode the result."""
        i = next(self._turn)
        self._kernels.reduce_encode_(
            self._layout.uplink,
            self._layout.downlink,
            0,
            self._received[i, :workers],
            self._server[i],
            torch.float32,
            self._outgoing[i, 0],
        )

    def decode(self) -> None:
        """Decode on a worker, after the downlink."""
        i = next(self._turn)
        self._kernels.decode(self._layout.downlink, self._sent[i], self._out[i], torch.float32)


def _cpu_s_of_empty_part(probe: Probe, method: Method) -> float:
    """Measure the processor time of a nearly empty part: messages, Python and thread switches."""
    config = Config(
        worker_quantizer=method.quantizer,
        server_quantizer=method.quantizer,
        topology=method.topology,
    )
    session = ExchangeSession(config)
    matrices = torch.zeros(_BUCKETS, _TINY // _ROW, _ROW)
    flats = torch.zeros(_BUCKETS, _TINY)
    buckets = [[matrix] for matrix in matrices]
    try:
        return probe.time_processor(lambda: exchange_all(session, flats, buckets)) / _BUCKETS
    finally:
        session.connection.close()


def _adam(x: Tensor) -> AdamSource:
    terms = torch.tensor([_ADAM], dtype=torch.float64)
    return AdamSource(torch.zeros_like(x), torch.ones_like(x), terms)


def _discard(_: Tensor) -> None:
    pass
