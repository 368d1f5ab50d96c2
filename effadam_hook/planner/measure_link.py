"""Measurement of the link and of the collectives, as input of the cost model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effadam_hook.exchange.probe import Probe, Timing
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Link
from effadam_hook.planner.traffic import (
    ParameterSize,
    block_size_of,
    legs_of,
    make_buckets,
    parts_of,
    unit_leg,
)

__all__ = ["MeasuredLeg", "MeasuredLink", "measure_link", "measurement_count"]

_FIRST_BYTES = 1 << 18
_MAX_BYTES = 1 << 26
_MIN_SENDING_S = 0.1
_MAX_LEG_S = 0.4
_DEPTH = 4
_EMPTY_BYTES = 64
_REPEATS = 4
_EMPTY_REPEATS = 20


@dataclass(frozen=True)
class MeasuredLeg:
    """Measured performance of one collective.

    Attributes:
        name: Name of the leg, see :data:`effadam_hook.exchange.probe.LEGS`.
        busiest_bytes: Bytes in the busier direction of the busiest node's card, in the measurement.
        inside_bytes: Bytes in the busier direction between a rank and the others of its node.
        seconds: Duration of one of several concurrent collectives. The minimum of several repeats, as
            other processes on the machine can only add to it.
        overhead_s: Duration of one nearly empty collective that runs alone, likewise a minimum.
        slowdown: ``seconds`` without a share of ``overhead_s``, divided by the time that the bytes need
            on the links.
        cpu_s: Processor time of a rank for one nearly empty collective.
        cpu_s_per_byte: Further processor time of a rank per byte.
    """

    name: str
    busiest_bytes: float
    inside_bytes: float
    seconds: float
    overhead_s: float
    slowdown: float
    cpu_s: float
    cpu_s_per_byte: float


@dataclass(frozen=True)
class MeasuredLink:
    """Measured performance of the link.

    Attributes:
        payload_bytes_s: Bytes per second that every node sends to others while it receives as many.
        latency_s: Seconds from sending a message of one byte to its reception by the other program.
        legs: Measured performance of the collectives.
        inside_bytes_s: Bytes per second that every rank sends inside its node while it receives as many
            and all other ranks do the same; None if nodes have one rank.
        inside_latency_s: Likewise for a message of one byte.
    """

    payload_bytes_s: float
    latency_s: float
    legs: Sequence[MeasuredLeg]
    inside_bytes_s: float | None = None
    inside_latency_s: float = 0.0

    def as_link(self, cpu_weight: float = 1.0) -> Link:
        """Convert to the link of the cost model, with an efficiency of 1, as headers were not measured.

        Args:
            cpu_weight: Seconds of computing that a second of processor time displaces: the number of
                ranks that share a core, or 0 if the model is computed on another device.

        Returns:
            The link.
        """
        return Link(
            self.payload_bytes_s,
            latency_s=self.latency_s,
            efficiency=1.0,
            slowdown={leg.name: leg.slowdown for leg in self.legs},
            overhead_s={leg.name: leg.overhead_s for leg in self.legs},
            cpu_s={leg.name: leg.cpu_s * cpu_weight for leg in self.legs},
            cpu_s_per_byte={leg.name: leg.cpu_s_per_byte * cpu_weight for leg in self.legs},
        )

    def inside(self) -> Link | None:
        """Convert to the cost model's link inside a node; None if nodes have one rank."""
        if self.inside_bytes_s is None:
            return None
        return Link(self.inside_bytes_s, latency_s=self.inside_latency_s, efficiency=1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain values."""
        return {
            "payload_bytes_s": self.payload_bytes_s,
            "latency_s": self.latency_s,
            "inside_bytes_s": self.inside_bytes_s,
            "inside_latency_s": self.inside_latency_s,
            "legs": [vars(leg) for leg in self.legs],
        }


def measurement_count(methods: Sequence[Method]) -> int:
    """Return how many times :func:`measure_link` calls its argument ``advance``."""
    return 1 + len(_examples(methods))


def measure_link(
    probe: Probe,
    methods: Sequence[Method],
    parameters: Sequence[ParameterSize],
    advance: Callable[[str], None],
    nccl: bool = False,
) -> MeasuredLink:
    """Measure the link, then every collective that the methods use; a collective operation.

    Args:
        probe: The probe of the ranks. With nodes of several ranks, the link between nodes and that
            inside them are measured one after the other.
        methods: The methods that will be predicted, with their topologies on these nodes.
        parameters: Sizes of the model's parameters. They determine the size of the messages.
        advance: Called with a description at the start of each measurement.
        nccl: Whether the backend is NCCL instead of Gloo.

    Returns:
        The measured link.
    """
    advance("link")
    nodes = probe.nodes
    inside: tuple[float, float] | None = None
    if nodes is None or nodes.ranks_per_node == 1:
        ranks_per_node, (rate, latency_s) = 1, _rate(probe, range(probe.world_size))
    else:
        ranks_per_node = nodes.ranks_per_node
        rate, latency_s = _rate(probe, nodes.peers_of(probe.rank))
        rate *= ranks_per_node  # all ranks of a node send at once through its card
        inside = _rate(probe, nodes.node_of(probe.rank))
    cluster = Cluster(
        probe.world_size,
        Link(rate, efficiency=1.0),
        on_nccl=nccl,
        ranks_per_node=ranks_per_node,
        inside=None if inside is None else Link(inside[0], efficiency=1.0),
    )
    legs = []
    for name, method in _examples(methods).items():
        advance(name)
        legs.append(_measure_leg(probe, name, method, parameters, cluster))
    return MeasuredLink(rate, latency_s, legs, *(inside or ()))


def _rate(probe: Probe, ring: Sequence[int]) -> tuple[float, float]:
    """Measure bytes per second of every rank in a ring, and the seconds of an empty message."""
    empty = probe.time_link(1, _EMPTY_REPEATS, ring=ring)
    size = _FIRST_BYTES
    while (sending_s := _sending_s(probe.time_link(size, 1, ring=ring), empty)) < _MIN_SENDING_S:
        if size == _MAX_BYTES:
            break
        size = min(_MAX_BYTES, max(2 * size, int(size * _MIN_SENDING_S / max(sending_s, 1e-6))))
    full = probe.time_link(size, _REPEATS, _DEPTH, ring)
    return size / _sending_s(full, empty, _DEPTH), empty.seconds


def _examples(methods: Sequence[Method]) -> Mapping[str, Method]:
    """Return, for every collective, the method that sends the most bytes with it."""
    tiny = [ParameterSize(1 << 16, 1 << 8)]
    largest: dict[str, tuple[float, Method]] = {}
    for method in methods:
        for leg in legs_of(method, tiny, 2, ranks_per_node=2):
            if leg.name not in largest or leg.size_bytes > largest[leg.name][0]:
                largest[leg.name] = (leg.size_bytes, method)
    return {name: method for name, (_, method) in largest.items()}


def _measure_leg(
    probe: Probe,
    name: str,
    method: Method,
    parameters: Sequence[ParameterSize],
    cluster: Cluster,
) -> MeasuredLeg:
    n, shape = cluster.world_size, (cluster.nodes, cluster.on_nccl, cluster.ranks_per_node)
    parts = [
        part
        for bucket in make_buckets(parameters, method.bucket_mb)
        for part in parts_of(method, bucket, n, cluster.on_nccl)
    ]
    largest = max(parts, key=lambda part: sum(p.numel for p in part))
    leg = next(
        leg
        for leg in legs_of(method, largest, *shape, block_size_of(parameters))
        if leg.name == name
    )
    unit = unit_leg(name, cluster.nodes, cluster.ranks_per_node, cluster.on_nccl)
    empty = probe.time_leg(name, _EMPTY_BYTES * n, _EMPTY_REPEATS)
    empties = probe.time_leg(name, _EMPTY_BYTES * n, _EMPTY_REPEATS, _DEPTH)
    if not unit.size_bytes:  # a meeting, without bytes
        return MeasuredLeg(name, 0.0, 0.0, empty.best_s, empty.best_s, 1.0, empties.cpu_s, 0.0)
    size = int(leg.size_bytes / unit.size_bytes)
    size = max(_EMPTY_BYTES * n * 16, min(size, int(_MAX_LEG_S / cluster.alone_s(unit))))
    full = probe.time_leg(name, size, _REPEATS, _DEPTH)
    return MeasuredLeg(
        name,
        size * unit.busiest_bytes,
        size * unit.inside_bytes,
        full.best_s,
        empty.best_s,
        max(1.0, _sending_s(full, empty, _DEPTH) / (size * cluster.alone_s(unit))),
        empties.cpu_s,
        max(0.0, full.cpu_s - empties.cpu_s) / (size * unit.size_bytes),
    )


def _sending_s(full: Timing, empty: Timing, depth: int = 1) -> float:
    """Compute how long one of ``depth`` concurrent transfers occupies the link.

    The minimum duration is used, as disturbances only lengthen a transfer. One empty transfer is
    subtracted for all of them: after the last byte is sent, only its latency remains.
    """
    return max(full.best_s - empty.best_s / depth, full.best_s / 100, 1e-9)
