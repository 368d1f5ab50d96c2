"""Times of the link and of the collectives, measured with the calls that an exchange makes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.collectives import all_gather_flat, all_to_all_flat
from effadam_hook.exchange.dense import start_average
from effadam_hook.exchange.topology import (
    FLAT_TOPOLOGIES,
    HIERARCHICAL,
    NodeTable,
    Topology,
    make_topology,
)
from effadam_hook.exchange.waiting import finish, gather_bytes

__all__ = ["LEGS", "Probe", "Timing"]

LEGS = (
    "all_reduce",
    *(f"{direction}/{name}" for name in FLAT_TOPOLOGIES for direction in ("up", "down")),
    *(f"{stage}/{HIERARCHICAL}" for stage in ("mean", "up", "down", "gather")),
)
"""Collectives that can be timed; the part after the slash is the topology."""

Start = Callable[[], "list[dist.Work | None]"]


@dataclass(frozen=True)
class Timing:
    """The times of a transfer.

    Attributes:
        seconds: Median over the repeats of the time on the slowest rank.
        best_s: The shortest of those times.
        cpu_s: Processor time of one transfer, mean over the ranks.
    """

    seconds: float
    best_s: float
    cpu_s: float


class Probe:
    """Times of transfers; every rank must call the same methods in the same order.

    Args:
        group: The process group.
        device: Device of the tensors.
        nodes: The nodes of the group, of which collectives inside and between nodes are timed.

    Attributes:
        rank: Rank of this process in the group.
        world_size: Size of the group.
        nodes: The nodes; None if they were not given.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, nodes: NodeTable | None = None
    ) -> None:
        self._group = group
        self._device = device
        self.nodes = nodes
        self.rank = group.rank()
        self.world_size = group.size()
        self._topologies: dict[str, Topology] = {}
        self._subgroups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    def share(self, value: Any) -> list[Any]:
        """Gather a plain value from every rank; a collective operation.

        Args:
            value: A value that JSON can represent.

        Returns:
            All ranks' values, by rank.
        """
        data = json.dumps(value).encode()
        gathered = gather_bytes(data, self._group, self._device, everywhere=True)
        return [json.loads(text) for text in gathered]

    def time_link(
        self, size: int, repeats: int, depth: int = 1, ring: Sequence[int] | None = None
    ) -> Timing:
        """Time a transfer from every rank to the next one, all ranks at once.

        Args:
            size: Bytes that every rank sends.
            repeats: Number of measurements.
            depth: Number of transfers in progress at once.
            ring: Ranks in whose order this rank sends, such as those of its node; None for all.

        Returns:
            The time of one transfer: that of all at once, divided by their number.
        """
        ring = range(self.world_size) if ring is None else ring
        here = ring.index(self.rank)
        ranks = dist.get_process_group_ranks(self._group)
        after, before = ranks[ring[(here + 1) % len(ring)]], ranks[ring[here - 1]]

        def transfer() -> Start:
            pair = [
                dist.P2POp(dist.isend, self._bytes(size), after, self._group),
                dist.P2POp(dist.irecv, self._bytes(size), before, self._group),
            ]
            return lambda: list(dist.batch_isend_irecv(pair))

        # Gloo closes the connection of a send or receive when a wait for it times out, so that these
        # cannot be waited for in slices.
        return self._time([transfer() for _ in range(depth)], repeats, dist.Work.wait)

    def time_leg(self, name: str, size: int, repeats: int, depth: int = 1) -> Timing:
        """Time a collective.

        Args:
            name: One of :data:`LEGS`.
            size: Bytes of the gradients for ``"all_reduce"`` and ``"mean/hierarchical"``, else of a
                whole payload.
            repeats: Number of measurements.
            depth: Number of collectives in progress at once, as in a step with several buckets. On
                a busy machine a single collective measures the wait for a core rather than the
                link.

        Returns:
            The time of one collective: that of all at once, divided by their number.
        """
        return self._time([self._leg(name, size) for _ in range(depth)], repeats)

    def _leg(self, name: str, size: int) -> Start:
        """Return the start of a collective, with buffers of its own."""
        if name == "all_reduce":
            buffer = torch.zeros(max(1, size // 4), device=self._device)
            return lambda: [start_average(buffer, self._group)]
        stage, _, kind = name.partition("/")
        topology = self._topology(kind)
        group, chunks = self._group, topology.servers
        if kind == HIERARCHICAL:
            assert self.nodes is not None
            inside, between = self._node_groups(self.nodes)
            if stage in ("mean", "gather"):
                ranks = self.nodes.ranks_per_node
                parts, whole = self._bytes(2, ranks, max(1, size // ranks))
                if stage == "mean":
                    return lambda: [all_to_all_flat(whole.view(-1), parts.view(-1), inside)]
                return lambda: [all_gather_flat(whole.view(-1), parts[0], inside)]
            group, chunks = between, len(self.nodes.nodes)
        payload = self._bytes(chunks, max(1, size // topology.servers))
        if stage == "up":
            rows = group.size() if topology.serves is not None else 0
            received = self._bytes(rows, payload.shape[1])
            return lambda: [topology.send_up(payload, received, group)]
        outgoing = topology.outgoing(payload)
        return lambda: [topology.send_down(outgoing, payload, group)]

    def _node_groups(self, nodes: NodeTable) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Return the group of this rank's node, and that of its peers on other nodes."""
        if self._subgroups is None:
            ranks = dist.get_process_group_ranks(self._group)
            own: list[dist.ProcessGroup] = []
            for rows in (nodes.nodes, [*zip(*nodes.nodes, strict=True)]):
                for row in rows:  # every rank makes every group, in one order
                    group = dist.new_group([ranks[rank] for rank in row])
                    own += [group] if self.rank in row else []
            self._subgroups = (own[0], own[1])
        return self._subgroups

    def _topology(self, kind: str) -> Topology:
        if kind not in self._topologies:
            topology = self._topologies[kind] = make_topology(kind, self._group, self.nodes)
            if self._device.type == "cpu":
                group = self._group
                if kind == HIERARCHICAL and self.nodes is not None:
                    group = self._node_groups(self.nodes)[1]
                topology.measure_route(group)
        return self._topologies[kind]

    def time_busy(self, call: Callable[[], None], seconds: float = 0.05, windows: int = 3) -> float:
        """Time a computation while every rank runs the same one.

        Args:
            call: The computation.
            seconds: Length of one window, in which it is repeated.
            windows: Number of windows.

        Returns:
            Seconds of one call, mean over repeats and ranks, in the fastest window. The time that a
            rank waits for a core because the other ranks compute counts.
        """
        call()
        return min(self._window(call, seconds) for _ in range(windows))

    def count_for(self, call: Callable[[], None], seconds: float) -> int:
        """Count the calls that fill a time, for calls that contain collectives.

        Args:
            call: The function; it is called once.
            seconds: Approximate length of all calls.

        Returns:
            The number of calls, at least 1, the same on every rank.
        """
        self.share(None)
        begin = time.perf_counter()
        call()
        self.synchronize()
        once_s: float = max(self.share(time.perf_counter() - begin))
        return max(1, round(seconds / once_s))

    def time_processor(self, call: Callable[[], None], seconds: float = 0.3) -> float:
        """Measure the processor time of a call that may wait, while every rank runs the same one.

        Args:
            call: The function, called equally often on every rank.
            seconds: Approximate length of all calls.

        Returns:
            Processor time of one call, all threads of a rank together, mean over the ranks.
        """
        call()
        count = self.count_for(call, seconds)
        cpu = -time.process_time()
        for _ in range(count):
            call()
        cpu += time.process_time()
        return statistics.fmean(self.share(cpu / count))

    def _window(self, call: Callable[[], None], seconds: float) -> float:
        self.synchronize()
        self.share(None)
        begin = time.perf_counter()
        count, took = 0, 0.0
        while took < seconds:
            call()
            self.synchronize()
            count += 1
            took = time.perf_counter() - begin
        return statistics.fmean(self.share(took / count))

    def _bytes(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self._device)

    def _time(
        self, starts: Sequence[Start], repeats: int, wait: Callable[[dist.Work], object] = finish
    ) -> Timing:
        took: list[list[float]] = []
        for _ in range(repeats + 1):
            self.share(None)
            took.append([each / len(starts) for each in self._run(starts, wait)])
        timings = self.share(took[1:])  # the first one makes connections
        slowest = [max(each[0] for each in ranks) for ranks in zip(*timings, strict=True)]
        cpu_s = statistics.fmean(each[1] for rank in timings for each in rank)
        return Timing(statistics.median(slowest), min(slowest), cpu_s)

    def _run(
        self, starts: Sequence[Start], wait: Callable[[dist.Work], object]
    ) -> tuple[float, float]:
        """Return the seconds and the processor seconds of all transfers on this rank."""
        cpu = time.process_time()
        begin = time.perf_counter()
        for work in [work for start in starts for work in start()]:
            if work is not None:
                wait(work)
        self.synchronize()
        return time.perf_counter() - begin, time.process_time() - cpu

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
