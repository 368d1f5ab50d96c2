"""The cluster of a prediction: nodes, their links and processors, and the durations measured there.

A node's network card is shared by all of its ranks. Inside a node every rank has a link of its own.
This module contains floats only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from effadam_hook.exchange.topology import Leg

__all__ = ["TCP_EFFICIENCY", "Cluster", "Compute", "Link", "Speed"]

TCP_EFFICIENCY = 0.947
"""Payload fraction of a link's bytes, measured for TCP over Ethernet with frames of 1500 bytes."""


@dataclass(frozen=True)
class Link:
    """Full-duplex link of a node, or of a rank inside its node, and the collectives on it.

    The mappings count for the link of a node only, and cover collectives inside it as well.
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
        pack_s: Packing the gradients for the other ranks of a node, per element.
        mean_s: Averaging the share of a rank over its node, per element of the whole bucket.
    """

    encode_s: float = 0.0
    reduce_s: float = 0.0
    reduce_payload_s: float = 0.0
    decode_s: float = 0.0
    call_s: float = 0.0
    pack_s: float = 0.0
    mean_s: float = 0.0


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

    @property
    def total_s(self) -> float:
        """Return the duration of the step."""
        return self.forward_s + self.backward_s + self.rest_s


@dataclass(frozen=True)
class Cluster:
    """Nodes and their ranks, links and processors.

    Attributes:
        world_size: Number of ranks.
        link: The link of each node, its network card, which its ranks share.
        cores: Number of threads of a rank that run concurrently at full speed.
        on_nccl: Whether NCCL carries the bytes, see :func:`legs_of`. One stream then runs the exchanges
            of all buckets in turn.
        ranks_per_node: Number of ranks of a node. A flat topology counts every rank as a worker, the
            hierarchical one every node.
        inside: The link of each rank to the other ranks of its node; None if it never limits.

    Raises:
        ValueError: If ``world_size`` is less than 1, ``cores`` is not positive, or nodes would have
            unequal numbers of ranks.
    """

    world_size: int
    link: Link
    cores: float = math.inf
    on_nccl: bool = False
    ranks_per_node: int = 1
    inside: Link | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"Invalid world_size: {self.world_size}. Must be 1 or more.")
        if self.ranks_per_node < 1 or self.world_size % self.ranks_per_node:
            raise ValueError(
                f"Invalid ranks_per_node: {self.ranks_per_node}. Must divide the number of ranks, "
                f"{self.world_size}."
            )
        if not self.cores > 0:
            raise ValueError(f"Invalid cores: {self.cores}. Must be above 0.")

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return self.world_size // self.ranks_per_node

    @property
    def inside_bytes_s(self) -> float:
        """Return the payload bytes per second between ranks of a node."""
        return math.inf if self.inside is None else self.inside.payload_bytes_s

    def alone_s(self, leg: Leg) -> float:
        """Compute the seconds that the bytes of a leg need on the links."""
        inside_s = leg.inside_bytes / self.inside_bytes_s
        return max(leg.busiest_bytes / self.link.payload_bytes_s, inside_s)
