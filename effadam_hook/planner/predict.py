"""Prediction of exchange time and step time from measured durations and rates.

A leg of an exchange, see :mod:`effadam_hook.planner.traffic`, takes

    ``rounds × latency + messages × message time + bytes / (bandwidth × efficiency) × slowdown``

on the node's card or inside the node, whichever takes longer, and ``cpu_s + bytes × cpu_s_per_byte``
of the rank's processor time. Kernels take a time per element; the reduction takes a time per element
and a time per element and payload. :mod:`~effadam_hook.planner.timeline` overlaps the buckets with one
another and with backward; they share the links and the processor.

This module contains integers and floats only, no tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.cluster import TCP_EFFICIENCY, Cluster, Compute, Link, Speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.timeline import Transit, Work, run_timeline
from effadam_hook.planner.traffic import (
    ParameterSize,
    block_size_of,
    legs_of,
    make_buckets,
    parts_of,
    shares_of,
)

__all__ = [
    "TCP_EFFICIENCY",
    "Cluster",
    "Compute",
    "Link",
    "Prediction",
    "Speed",
    "predict",
]


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
        busiest_bytes: Bytes on the busiest node's card in its busier direction, including headers.
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
    block_size = block_size_of(parameters)
    transits: list[Transit] = []
    ready = 0
    sent = received = inside = 0.0
    method = method.on_nodes(cluster.ranks_per_node if cluster.nodes > 1 else 1)
    for bucket in buckets:
        ready += sum(parameter.numel for parameter in bucket)
        for part in parts_of(method, bucket, cluster.world_size, nccl=cluster.on_nccl):
            shape = cluster.nodes, cluster.on_nccl, cluster.ranks_per_node
            legs = legs_of(method, part, *shape, block_size)
            sent += sum(leg.out_bytes for leg in legs)
            received += sum(leg.in_bytes for leg in legs)
            inside += sum(leg.inside_bytes for leg in legs)
            works = _works(method, part, legs, cluster, speed)
            if cluster.on_nccl:
                works = [replace(work, stage="stream") for work in works]
            transits.append(Transit(ready / total, works))
    capacity = {"out": 1.0, "in": 1.0, "inside": 1.0, "cpu": cluster.cores}
    backward = Work("backward", compute.backward_s, {"cpu": 1.0})
    overlapped_s, _ = run_timeline(backward, transits, capacity)
    exchange_s, _ = run_timeline(Work("backward", 0.0), transits, capacity)
    busiest = max(sent, received) / cluster.link.efficiency
    return Prediction(
        method,
        compute.forward_s + overlapped_s + compute.rest_s,
        exchange_s,
        overlapped_s - compute.backward_s,
        max(busiest / cluster.link.bandwidth_bytes_s, inside / cluster.inside_bytes_s),
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
    transfers = [_transfer(leg, cluster) for leg in legs]
    if not method.is_effadam:
        before = speed.encode_s * numel + speed.call_s
        after = speed.decode_s * numel + speed.call_s
        return _in_turn([("encode", before)], transfers, ("decode", after))
    shares = shares_of(method, cluster.ranks_per_node)
    workers = cluster.world_size // shares
    reduced = numel / TOPOLOGIES[method.topology].servers_among(cluster.world_size)
    encode_s = numel / shares * speed.encode_s + speed.call_s
    stages = [
        ("encode", encode_s),
        ("reduce", reduced * (speed.reduce_s + workers * speed.reduce_payload_s) + speed.call_s),
    ]
    if shares > 1:
        pack_s = numel * speed.pack_s + speed.call_s
        stages = [("pack", pack_s), ("encode", encode_s + numel * speed.mean_s), stages[1]]
    return _in_turn(stages, transfers, ("decode", numel * speed.decode_s + speed.call_s))


def _in_turn(
    stages: Sequence[tuple[str, float]],
    transfers: Sequence[Sequence[Work]],
    last: tuple[str, float],
) -> list[Work]:
    """Put arithmetic before each transfer, as far as there is any, and at the end."""
    works: list[Work] = []
    for stage, transfer in itertools.zip_longest(stages, transfers):
        works += [] if stage is None else [_arithmetic(*stage)]
        works += transfer or ()
    return [*works, _arithmetic(*last)]


def _arithmetic(stage: str, seconds: float) -> Work:
    return Work(stage, seconds, {"cpu": 1.0})


def _transfer(leg: Leg, cluster: Cluster) -> list[Work]:
    """Return the work of a leg's stage, and the delay of its messages."""
    link = cluster.link
    near = cluster.inside if cluster.inside is not None and not leg.busiest_bytes else link
    empty_s = leg.rounds * near.latency_s + leg.messages * near.message_s
    overhead_s = link.overhead_s.get(leg.name, empty_s)
    seconds = cluster.alone_s(leg) * max(1.0, link.slowdown.get(leg.name, 1.0))
    if not seconds:
        return [Work("", overhead_s)]
    cpu_s = link.cpu_s.get(leg.name, 0.0)
    cpu_s += leg.size_bytes * link.cpu_s_per_byte.get(leg.name, 0.0)
    uses = {
        "out": leg.out_bytes / link.payload_bytes_s / seconds,
        "in": leg.in_bytes / link.payload_bytes_s / seconds,
        "inside": leg.inside_bytes / cluster.inside_bytes_s / seconds,
        "cpu": cpu_s / seconds,
    }
    return [Work(leg.name, seconds, uses), Work("", overhead_s)]
