"""What a training step costs: exchange time and step time, from a few measured numbers.

A leg of an exchange, see :mod:`effadam_hook.planner.traffic`, takes

    ``rounds × latency + messages × message time + bytes / (bandwidth × efficiency) × slowdown``

and ``cpu_s + bytes × cpu_s_per_byte`` of the rank's processor. Kernels take a time per element, and
the reduction one per element and payload. :mod:`~effadam_hook.planner.timeline` overlaps the buckets
with one another and with backward; they share link and processor.

This module is integers and floats only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.method import Method
from effadam_hook.planner.timeline import Transit, Work, run_timeline
from effadam_hook.planner.traffic import Parameter, legs_of, make_buckets, parts_of

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
"""Part of a link's bytes that are payload: TCP over Ethernet with frames of 1500 bytes, measured."""


@dataclass(frozen=True)
class Link:
    """A rank's full-duplex link, and what the collectives make of it.

    What is told by name of a leg is what :mod:`effadam_hook.exchange.probe` measures.

    Attributes:
        bandwidth_bytes_s: Bytes a second in each direction, headers included.
        latency_s: From a message's begin to its arrival on the other side, if it is empty.
        message_s: What a rank is busy with a message, whatever its size.
        efficiency: Part of the bytes that are payload.
        slowdown: By name of a leg, what a collective takes over what the link alone would. 1 for
            those that are not named.
        overhead_s: By name of a leg, what it takes when it is empty; what latency and messages make
            for those that are not named.
        cpu_s: By name of a leg, processor time of a rank for one, whatever its size; none for those
            that are not named.
        cpu_s_per_byte: By name of a leg, processor time of a rank for a byte in the leg's busier
            direction; none for those that are not named.
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
        """Payload bytes a second in each direction."""
        return self.bandwidth_bytes_s * self.efficiency


@dataclass(frozen=True)
class Speed:
    """What the arithmetic of a method takes, in seconds.

    Attributes:
        encode_s: Per element, before the uplink.
        reduce_s: Per element that a server reduces.
        reduce_payload_s: Per element that a server reduces and payload that it has of it.
        decode_s: Per element, after the downlink.
        call_s: Per part of a bucket and kernel, with what else the part needs of the processor
            besides its messages.
    """

    encode_s: float = 0.0
    reduce_s: float = 0.0
    reduce_payload_s: float = 0.0
    decode_s: float = 0.0
    call_s: float = 0.0


@dataclass(frozen=True)
class Compute:
    """What a step takes without communication, in seconds.

    Attributes:
        forward_s: Forward, and all that comes before backward.
        backward_s: Backward, which communication overlaps.
        rest_s: What comes after: the optimizer's step.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    rest_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """The ranks.

    Attributes:
        world_size: How many.
        link: Every rank's link.
        cores: How many of a rank's threads go on at once at the speeds that are given.
        tree: Whether an all-reduce takes ``2 log2 N`` rounds, see :func:`legs_of`.
        in_order: Whether a bucket's exchange waits for that of the bucket before, as on NCCL, where
            all of it is issued on one stream.
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
    """What the model says of a method.

    Attributes:
        method: The method.
        step_s: A training step.
        exchange_s: The exchange alone, with all gradients ready at its begin.
        exposed_s: What a step takes longer than without communication.
        floor_s: What the busiest direction of the busiest link takes for the bytes.
        busiest_bytes: Those bytes, headers included.
    """

    method: Method
    step_s: float
    exchange_s: float
    exposed_s: float
    floor_s: float
    busiest_bytes: float


def predict(
    method: Method,
    parameters: Sequence[Parameter],
    cluster: Cluster,
    speed: Speed | None = None,
    compute: Compute | None = None,
) -> Prediction:
    """Predict a step.

    Args:
        method: How gradients are averaged.
        parameters: The model's, in its order.
        cluster: The ranks.
        speed: Of the method's arithmetic; None takes no time.
        compute: The step without communication; None takes no time.

    Returns:
        The prediction.

    Raises:
        ValueError: If a value is out of range, the quantizer is unknown, or there are no parameters.
    """
    speed, compute = speed or Speed(), compute or Compute()
    if not parameters:
        raise ValueError(
            "Invalid parameters: none. Must be at least one, of those that are trained."
        )
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
    bucket: Sequence[Parameter],
    legs: Sequence[Leg],
    cluster: Cluster,
    speed: Speed,
) -> list[Work]:
    """What is done with one bucket, in order."""
    if method.kind == "none":
        return []
    numel = sum(parameter.numel for parameter in bucket)
    transfers = [work for leg in legs for work in _transfer(leg, cluster.link)]
    if not method.is_ours:
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
    """A leg as a stage's work, and the time that its messages are under way."""
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
