"""Prediction of exchange time and step time from measured durations and rates.

A leg of an exchange, see :mod:`effadam_hook.planner.traffic`, takes

    ``rounds × latency + messages × message time + bytes / (bandwidth × efficiency) × slowdown``

and ``cpu_s + bytes × cpu_s_per_byte`` of the rank's processor time. Kernels take a time per element;
the reduction takes a time per element and a time per element and payload.
:mod:`~effadam_hook.planner.timeline` overlaps the buckets with one another and with backward; they
share the link and the processor.

This module contains integers and floats only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.method import Method
from effadam_hook.planner.timeline import Transit, Work, run_timeline
from effadam_hook.planner.traffic import ParameterSize, legs_of, make_buckets, parts_of

__all__ = [
    "TCP_EFFICIENCY",
    "Cluster",
    "Compute",
    "Link",
    "Prediction",
    "Speed",
    "predict",
]

TCP_EFFICIENCY = 0.947
"""Payload fraction of a link's bytes, measured for TCP over Ethernet with frames of 1500 bytes."""


@dataclass(frozen=True)
class Link:
    """Full-duplex link of a rank, and the performance of the collectives on it.

    :mod:`effadam_hook.exchange.probe` measures the values that are keyed by the name of a leg.

    Attributes:
        bandwidth_bytes_s: Bytes per second in each direction, including headers.
        latency_s: Seconds from sending an empty message to its arrival.
        message_s: Seconds that a rank is occupied by a message, independent of its size.
        efficiency: Payload fraction of the bytes.
        slowdown: Duration of a collective divided by the time that its bytes need on the link, by
            name of the leg. 1 for missing names.
        overhead_s: Seconds of an empty collective, by name of the leg. For missing names it is
            computed from ``latency_s`` and ``message_s``.
        cpu_s: Processor time of a rank for one collective, independent of its size, by name of the
            leg. 0 for missing names.
        cpu_s_per_byte: Processor time of a rank per byte in the busier direction, by name of the leg.
            0 for missing names.

    Raises:
        ValueError: If a value is out of range.
    """

    bandwidth_bytes_s: float
    latency_s: float = 0.0
    message_s: float = 0.0
    efficiency: float = TCP_EFFICIENCY
    slowdown: Mapping[str, float] = field(default_factory=dict)
    overhead_s: Mapping[str, float] = field(default_factory=dict)
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    cpu_s_per_byte: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.bandwidth_bytes_s > 0:
            raise ValueError(
                f"Invalid bandwidth_bytes_s: {self.bandwidth_bytes_s}. Must be above 0."
            )
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"Invalid efficiency: {self.efficiency}. Must be above 0, at most 1.")
        for name, value in (("latency_s", self.latency_s), ("message_s", self.message_s)):
            if not value >= 0:
                raise ValueError(f"Invalid {name}: {value}. Must be 0 or more.")

    @property
    def payload_bytes_s(self) -> float:
        """Return the payload bytes per second in each direction."""
        return self.bandwidth_bytes_s * self.efficiency


@dataclass(frozen=True)
class Speed:
    """Durations of a method's arithmetic, in seconds.

    Attributes:
        encode_s: Encoding before the uplink, per element.
        reduce_s: Reduction on a server, per element.
        reduce_payload_s: Reduction on a server, per element and payload.
        decode_s: Decoding after the downlink, per element.
        call_s: Constant cost per part of a bucket and kernel. It includes the processor time of the
            part outside kernels, without that of its messages.
    """

    encode_s: float = 0.0
    reduce_s: float = 0.0
    reduce_payload_s: float = 0.0
    decode_s: float = 0.0
    call_s: float = 0.0


@dataclass(frozen=True)
class Compute:
    """Durations of a step without communication, in seconds.

    Attributes:
        forward_s: The forward pass and everything else before backward.
        backward_s: The backward pass, which overlaps with communication.
        rest_s: Everything after backward, such as the optimizer's step.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    rest_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Ranks, their links and their processors.

    Attributes:
        world_size: Number of ranks.
        link: The link of each rank.
        cores: Number of threads of a rank that run concurrently at full speed.
        tree: Whether an all-reduce takes ``2 log2 N`` rounds, see :func:`legs_of`.
        in_order: Whether the exchange of a bucket starts after that of the bucket before, as on NCCL,
            where one stream runs them all.

    Raises:
        ValueError: If ``world_size`` is less than 1 or ``cores`` is not positive.
    """

    world_size: int
    link: Link
    cores: float = math.inf
    tree: bool = False
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"Invalid world_size: {self.world_size}. Must be 1 or more.")
        if not self.cores > 0:
            raise ValueError(f"Invalid cores: {self.cores}. Must be above 0.")


@dataclass(frozen=True)
class Prediction:
    """Predicted durations of one method.

    Attributes:
        method: The method.
        step_s: Seconds of a training step.
        exchange_s: Seconds of the exchange alone, with all gradients ready at its start.
        exposed_s: Seconds by which communication lengthens a step.
        floor_s: Seconds that the bytes take on the busiest link in its busier direction, a lower bound
            of ``exchange_s``.
        busiest_bytes: Bytes on the busiest link in its busier direction, including headers.
    """

    method: Method
    step_s: float
    exchange_s: float
    exposed_s: float
    floor_s: float
    busiest_bytes: float


def predict(
    method: Method,
    parameters: Sequence[ParameterSize],
    cluster: Cluster,
    speed: Speed | None = None,
    compute: Compute | None = None,
) -> Prediction:
    """Predict the duration of a training step.

    Args:
        method: The method.
        parameters: Sizes of the trained parameters, in the model's order.
        cluster: The ranks.
        speed: Durations of the method's arithmetic; None for zero.
        compute: Durations of the step without communication; None for zero.

    Returns:
        The prediction.

    Raises:
        ValueError: If a value is out of range, the quantizer is unknown, or ``parameters`` is empty.
    """
    speed, compute = speed or Speed(), compute or Compute()
    if not parameters:
        raise ValueError("Invalid parameters: none. Must contain at least one trained parameter.")
    cap = math.inf if method.kind == "powersgd" else method.bucket_mb
    buckets = make_buckets(parameters, cap)
    total = sum(parameter.numel for parameter in parameters)
    transits: list[Transit] = []
    ready = 0
    sent = received = 0.0
    for bucket in buckets:
        ready += sum(parameter.numel for parameter in bucket)
        for part in parts_of(method, bucket, cluster.world_size, nccl=cluster.in_order):
            legs = legs_of(method, part, cluster.world_size, cluster.tree)
            sent += sum(leg.out_bytes for leg in legs)
            received += sum(leg.in_bytes for leg in legs)
            works = _works(method, part, legs, cluster, speed)
            if cluster.in_order:
                works = [replace(work, stage="stream") for work in works]
            transits.append(Transit(ready / total, works))
    capacity = {"out": 1.0, "in": 1.0, "cpu": cluster.cores}
    backward = Work("backward", compute.backward_s, {"cpu": 1.0})
    overlapped_s, _ = run_timeline(backward, transits, capacity)
    exchange_s, _ = run_timeline(Work("backward", 0.0), transits, capacity)
    busiest = max(sent, received) / cluster.link.efficiency
    return Prediction(
        method,
        compute.forward_s + overlapped_s + compute.rest_s,
        exchange_s,
        overlapped_s - compute.backward_s,
        busiest / cluster.link.bandwidth_bytes_s,
        busiest,
    )


def _works(
    method: Method,
    bucket: Sequence[ParameterSize],
    legs: Sequence[Leg],
    cluster: Cluster,
    speed: Speed,
) -> list[Work]:
    """Return the work on one bucket, in order."""
    if method.kind == "none":
        return []
    numel = sum(parameter.numel for parameter in bucket)
    transfers = [work for leg in legs for work in _transfer(leg, cluster.link)]
    if not method.is_effadam:
        before, after = speed.encode_s * numel, speed.decode_s * numel
        return [_arithmetic("encode", before), *transfers, _arithmetic("decode", after)]
    n = cluster.world_size
    reduced = numel / TOPOLOGIES[method.topology].servers_among(n)
    reduce_s = reduced * (speed.reduce_s + n * speed.reduce_payload_s) + speed.call_s
    split = len(transfers) // 2
    return [
        _arithmetic("encode", speed.encode_s * numel + speed.call_s),
        *transfers[:split],
        _arithmetic("reduce", reduce_s),
        *transfers[split:],
        _arithmetic("decode", speed.decode_s * numel + speed.call_s),
    ]


def _arithmetic(stage: str, seconds: float) -> Work:
    return Work(stage, seconds, {"cpu": 1.0})


def _transfer(leg: Leg, link: Link) -> list[Work]:
    """Return the work of a leg's stage, and the delay of its messages."""
    empty_s = leg.rounds * link.latency_s + leg.messages * link.message_s
    overhead_s = link.overhead_s.get(leg.name, empty_s)
    alone_s = leg.busiest_bytes / link.payload_bytes_s
    seconds = alone_s * max(1.0, link.slowdown.get(leg.name, 1.0))
    if not seconds:
        return [Work("", overhead_s)]
    cpu_s = link.cpu_s.get(leg.name, 0.0)
    cpu_s += leg.busiest_bytes * link.cpu_s_per_byte.get(leg.name, 0.0)
    uses = {
        "out": leg.out_bytes / link.payload_bytes_s / seconds,
        "in": leg.in_bytes / link.payload_bytes_s / seconds,
        "cpu": cpu_s / seconds,
    }
    return [Work(leg.name, seconds, uses), Work("", overhead_s)]
