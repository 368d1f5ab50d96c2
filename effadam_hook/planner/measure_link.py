"""Measurement of the link and of the collectives, as input of the cost model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effadam_hook.exchange.probe import Probe, Timing
from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Link
from effadam_hook.planner.traffic import ParameterSize, legs_of, make_buckets, parts_of

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
        busiest_bytes: Bytes in the busier direction of the busiest link, in the measurement.
        seconds: Duration of one of several concurrent collectives. The minimum of several repeats, as
            other processes on the machine can only add to it.
        overhead_s: Duration of one nearly empty collective that runs alone, likewise a minimum.
        slowdown: ``seconds`` without a share of ``overhead_s``, divided by the time that the bytes need
            on the link.
        cpu_s: Processor time of a rank for one nearly empty collective.
        cpu_s_per_byte: Further processor time of a rank per byte.
    """

    name: str
    busiest_bytes: float
    seconds: float
    overhead_s: float
    slowdown: float
    cpu_s: float
    cpu_s_per_byte: float


@dataclass(frozen=True)
class MeasuredLink:
    """Measured performance of the link.

    Attributes:
        payload_bytes_s: Bytes per second that every rank sends while it receives as many.
        latency_s: Seconds from sending a message of one byte to its reception by the other program.
        legs: Measured performance of the collectives.
    """

    payload_bytes_s: float
    latency_s: float
    legs: Sequence[MeasuredLeg]

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

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain values."""
        return {
            "payload_bytes_s": self.payload_bytes_s,
            "latency_s": self.latency_s,
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
        probe: The probe of the ranks.
        methods: The methods that will be predicted.
        parameters: Sizes of the model's parameters. They determine the size of the messages.
        advance: Called with a description at the start of each measurement.
        nccl: Whether the backend is NCCL instead of Gloo.

    Returns:
        The measured link.
    """
    advance("link")
    empty = probe.time_link(1, _EMPTY_REPEATS)
    size = _FIRST_BYTES
    while (sending_s := _sending_s(probe.time_link(size, 1), empty)) < _MIN_SENDING_S:
        if size == _MAX_BYTES:
            break
        size = min(_MAX_BYTES, max(2 * size, int(size * _MIN_SENDING_S / max(sending_s, 1e-6))))
    rate = size / _sending_s(probe.time_link(size, _REPEATS, _DEPTH), empty, _DEPTH)
    legs = []
    for name, method in _examples(methods).items():
        advance(name)
        legs.append(_measure_leg(probe, name, method, parameters, rate, nccl))
    return MeasuredLink(rate, empty.seconds, legs)


def _examples(methods: Sequence[Method]) -> Mapping[str, Method]:
    """Return, for every collective, the method that sends the most bytes with it."""
    tiny = [ParameterSize(1 << 16, 1 << 8)]
    largest: dict[str, tuple[float, Method]] = {}
    for method in methods:
        for leg in legs_of(method, tiny, 2):
            if leg.name not in largest or leg.busiest_bytes > largest[leg.name][0]:
                largest[leg.name] = (leg.busiest_bytes, method)
    return {name: method for name, (_, method) in largest.items()}


def _measure_leg(
    probe: Probe,
    name: str,
    method: Method,
    parameters: Sequence[ParameterSize],
    rate: float,
    nccl: bool,
) -> MeasuredLeg:
    n = probe.world_size
    parts = [
        part
        for bucket in make_buckets(parameters, method.bucket_mb)
        for part in parts_of(method, bucket, n, nccl)
    ]
    largest = max(parts, key=lambda part: sum(p.numel for p in part))
    leg = next(leg for leg in legs_of(method, largest, n, tree=nccl) if leg.name == name)
    share = _share(leg, n, nccl)
    size = int(leg.busiest_bytes / share)
    size = max(_EMPTY_BYTES * n * 16, min(size, int(rate * _MAX_LEG_S / share)))
    busiest = size * share
    empty = probe.time_leg(name, _EMPTY_BYTES * n, _EMPTY_REPEATS)
    empties = probe.time_leg(name, _EMPTY_BYTES * n, _EMPTY_REPEATS, _DEPTH)
    full = probe.time_leg(name, size, _REPEATS, _DEPTH)
    return MeasuredLeg(
        name,
        busiest,
        full.best_s,
        empty.best_s,
        max(1.0, _sending_s(full, empty, _DEPTH) * rate / busiest),
        empties.cpu_s,
        max(0.0, full.cpu_s - empties.cpu_s) / busiest,
    )


def _sending_s(full: Timing, empty: Timing, depth: int = 1) -> float:
    """Compute how long one of ``depth`` concurrent transfers occupies the link.

    The minimum duration is used, as disturbances only lengthen a transfer. One empty transfer is
    subtracted for all of them: after the last byte is sent, only its latency remains.
    """
    return max(full.best_s - empty.best_s / depth, full.best_s / 100, 1e-9)


def _share(leg: Leg, n: int, nccl: bool) -> float:
    """Return the bytes in the busier direction per byte of payload or gradient."""
    if leg.name == "all_reduce":
        return 2 * (n - 1) / n
    kind = TOPOLOGIES[leg.name.partition("/")[2]]
    (share,) = (one.busiest_bytes for one in kind.legs(1.0, n, nccl) if one.name == leg.name)
    return share
