"""Measures the link and the collectives, as the cost model wants to know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effadam_hook.exchange.probe import Probe, Timing
from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Link
from effadam_hook.planner.traffic import Parameter, legs_of, make_buckets, parts_of

__all__ = ["MeasuredLeg", "MeasuredLink", "measure_link", "parts_of_link"]

_FIRST_BYTES = 1 << 18
_MOST_BYTES = 1 << 26
_LONG_ENOUGH_S = 0.1
_LEG_S = 0.4
_DEPTH = 4
_EMPTY_BYTES = 64
_REPEATS = 4
_EMPTY_REPEATS = 20


@dataclass(frozen=True)
class MeasuredLeg:
    """What one collective does.

    Attributes:
        name: Its name, see :data:`effadam_hook.exchange.probe.LEGS`.
        busiest_bytes: Bytes in the busier direction of the busiest link, in the measurement.
        seconds: What one took, of several under way together; the best of a few tries, as others
            on the machine only ever make it slower.
        overhead_s: What one takes alone when it is as good as empty, likewise.
        slowdown: ``seconds``, without a share of ``overhead_s``, over what the link alone takes for
            the bytes.
        cpu_s: Processor time of a rank for one that is as good as empty.
        cpu_s_per_byte: Processor time of a rank besides.
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
    """What the link does.

    Attributes:
        payload_bytes_s: Bytes a second that every rank sends to another while it receives as many.
        latency_s: What a message of one byte takes, from one program to the other.
        legs: What the collectives do.
    """

    payload_bytes_s: float
    latency_s: float
    legs: Sequence[MeasuredLeg]

    def as_link(self, cpu_weight: float = 1.0) -> Link:
        """For the cost model. Bytes are payload bytes: what was measured has no headers in it.

        Args:
            cpu_weight: What a second of processor time takes from computing: as many seconds as ranks
                share a core; none where the model is computed elsewhere.
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
        """Plain values."""
        return {
            "payload_bytes_s": self.payload_bytes_s,
            "latency_s": self.latency_s,
            "legs": [vars(leg) for leg in self.legs],
        }


def parts_of_link(methods: Sequence[Method]) -> int:
    """How often :func:`measure_link` calls its ``advance``."""
    return 1 + len(_examples(methods))


def measure_link(
    probe: Probe,
    methods: Sequence[Method],
    parameters: Sequence[Parameter],
    advance: Callable[[str], None],
    nccl: bool = False,
) -> MeasuredLink:
    """Measure the link, then every collective that the methods use; a collective operation.

    Args:
        probe: The ranks.
        methods: What will be predicted.
        parameters: The model's. Collectives are measured with messages as large as its own are.
        advance: Called with a description when a part begins.
        nccl: Whether NCCL runs the collectives, and not Gloo.

    Returns:
        What was found.
    """
    advance("link")
    empty = probe.time_link(1, _EMPTY_REPEATS)
    size = _FIRST_BYTES
    while (took := _sending_s(probe.time_link(size, 1), empty)) < _LONG_ENOUGH_S:
        if size == _MOST_BYTES:
            break
        size = min(_MOST_BYTES, max(2 * size, int(size * _LONG_ENOUGH_S / max(took, 1e-6))))
    rate = size / _sending_s(probe.time_link(size, _REPEATS, _DEPTH), empty, _DEPTH)
    legs = []
    for name, method in _examples(methods).items():
        advance(name)
        legs.append(_measure_leg(probe, name, method, parameters, rate, nccl))
    return MeasuredLink(rate, empty.seconds, legs)


def _examples(methods: Sequence[Method]) -> Mapping[str, Method]:
    """For every collective, the method that sends most by it."""
    tiny = [Parameter(1 << 16, 1 << 8)]
    found: dict[str, tuple[float, Method]] = {}
    for method in methods:
        for leg in legs_of(method, tiny, 2):
            if leg.name not in found or leg.busiest_bytes > found[leg.name][0]:
                found[leg.name] = (leg.busiest_bytes, method)
    return {name: method for name, (_, method) in found.items()}


def _measure_leg(
    probe: Probe,
    name: str,
    method: Method,
    parameters: Sequence[Parameter],
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
    size = max(_EMPTY_BYTES * n * 16, min(size, int(rate * _LEG_S / share)))
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
    """What one of ``depth`` transfers under way together takes of the link.

    Of what the best took, as what disturbs a transfer never makes it faster. The last of them is still
    under way when nothing is left to send.
    """
    return max(full.best_s - empty.best_s / depth, full.best_s / 100, 1e-9)


def _share(leg: Leg, n: int, nccl: bool) -> float:
    """Bytes in the busier direction, for a byte of payload or gradient."""
    if leg.name == "all_reduce":
        return 2 * (n - 1) / n
    kind = TOPOLOGIES[leg.name.partition("/")[2]]
    (share,) = (one.busiest_bytes for one in kind.legs(1.0, n, nccl) if one.name == leg.name)
    return share
