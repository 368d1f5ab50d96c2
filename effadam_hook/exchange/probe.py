"""What the link and the collectives take, measured with the very calls that an exchange makes."""

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

from effadam_hook.exchange.dense import start_average
from effadam_hook.exchange.topology import TOPOLOGIES, Topology, make_topology
from effadam_hook.exchange.waiting import finish, gather_bytes

__all__ = ["LEGS", "Probe", "Timing"]

LEGS = ("all_reduce", *(f"{way}/{name}" for name in TOPOLOGIES for way in ("up", "down")))
"""Collectives that can be timed; what follows the slash is the topology."""

Start = Callable[[], "list[dist.Work | None]"]


@dataclass(frozen=True)
class Timing:
    """What a transfer took.

    Attributes:
        seconds: Median over the repeats of the time on the rank where it took longest.
        best_s: The shortest of those.
        cpu_s: Processor time of one transfer, mean over the ranks.
    """

    seconds: float
    best_s: float
    cpu_s: float


class Probe:
    """Times transfers; every rank must call the same methods in the same order.

    Args:
        group: The process group.
        device: Where its tensors are.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self.rank = group.rank()
        self.world_size = group.size()
        self._topologies: dict[str, Topology] = {}

    def share(self, value: Any) -> list[Any]:
        """Tell all ranks a plain value, and wait for theirs.

        Args:
            value: What JSON can hold.

        Returns:
            All ranks' values, by rank.
        """
        data = json.dumps(value).encode()
        gathered = gather_bytes(data, self._group, self._device, everywhere=True)
        return [json.loads(text) for text in gathered]

    def time_link(self, size: int, repeats: int, depth: int = 1) -> Timing:
        """Time a transfer from every rank to the next one, all at once.

        Args:
            size: Bytes that every rank sends.
            repeats: How often.
            depth: Transfers that are under way together.

        Returns:
            What one took, of those that are under way together.
        """
        here, n = self.rank, self.world_size
        ranks = dist.get_process_group_ranks(self._group)

        def transfer() -> Start:
            ways = [
                dist.P2POp(dist.isend, self._bytes(size), ranks[(here + 1) % n], self._group),
                dist.P2POp(dist.irecv, self._bytes(size), ranks[(here - 1) % n], self._group),
            ]
            return lambda: list(dist.batch_isend_irecv(ways))

        return self._time([transfer() for _ in range(depth)], repeats)

    def time_leg(self, name: str, size: int, repeats: int, depth: int = 1) -> Timing:
        """Time a collective.

        Args:
            name: One of :data:`LEGS`.
            size: Bytes of the gradients for ``"all_reduce"``, else of a whole payload.
            repeats: How often.
            depth: How many are under way together, as those of several buckets are. On a busy machine
                a single one shows how long ranks wait for a core rather than what the link carries.

        Returns:
            What one took, of those that are under way together.
        """
        return self._time([self._leg(name, size) for _ in range(depth)], repeats)

    def time_both_ways(self, topology: str, size: int, repeats: int) -> Timing:
        """Time an uplink and a downlink, under way together as in the middle of a step.

        Args:
            topology: Its name.
            size: Bytes of a whole payload.
            repeats: How often.

        Returns:
            What one of the two took, on average.
        """
        return self._time(
            [self._leg(f"{route}/{topology}", size) for route in ("up", "down")], repeats
        )

    def _leg(self, name: str, size: int) -> Start:
        """A collective with buffers of its own."""
        if name == "all_reduce":
            buffer = torch.zeros(max(1, size // 4), device=self._device)
            return lambda: [start_average(buffer, self._group)]
        direction, _, kind = name.partition("/")
        topology = self._topology(kind)
        payload = self._bytes(topology.servers, max(1, size // topology.servers))
        if direction == "up":
            rows = self.world_size if topology.serves is not None else 0
            received = self._bytes(rows, payload.shape[1])
            return lambda: [topology.send_up(payload, received, self._group)]
        outgoing = topology.outgoing(payload)
        return lambda: [topology.send_down(outgoing, payload, self._group)]

    def _topology(self, kind: str) -> Topology:
        if kind not in self._topologies:
            topology = self._topologies[kind] = make_topology(kind, self._group)
            if self._device.type == "cpu":
                topology.measure_route(self._group)
        return self._topologies[kind]

    def time_busy(self, call: Callable[[], None], seconds: float = 0.05, windows: int = 3) -> float:
        """Time a computation while every rank does the same.

        Args:
            call: The computation.
            seconds: How long to repeat it.
            windows: How often to do all that.

        Returns:
            What one took, mean over repeats and ranks: the time that a rank waits for a core because
            the others compute counts. Of the windows the best, in which others disturbed least.
        """
        call()
        return min(self._window(call, seconds) for _ in range(windows))

    def count_for(self, call: Callable[[], None], seconds: float) -> int:
        """How often to do something that ranks must do equally often, because they meet in it.

        Args:
            call: What to do; it is done once.
            seconds: How long all together should take, about.

        Returns:
            At least 1, the same on every rank.
        """
        self.share(None)
        begin = time.perf_counter()
        call()
        self.synchronize()
        once_s: float = max(self.share(time.perf_counter() - begin))
        return max(1, round(seconds / once_s))

    def time_processor(self, call: Callable[[], None], seconds: float = 0.3) -> float:
        """Processor time of something that waits in between, while every rank does the same.

        Args:
            call: What to do, the same number of times on every rank.
            seconds: How long to repeat it, about.

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

    def _time(self, starts: Sequence[Start], repeats: int) -> Timing:
        took: list[list[float]] = []
        for _ in range(repeats + 1):
            self.share(None)
            took.append([each / len(starts) for each in self._run(starts)])
        timings = self.share(took[1:])  # the first makes connections
        slowest = [max(each[0] for each in ranks) for ranks in zip(*timings, strict=True)]
        cpu_s = statistics.fmean(each[1] for rank in timings for each in rank)
        return Timing(statistics.median(slowest), min(slowest), cpu_s)

    def _run(self, starts: Sequence[Start]) -> tuple[float, float]:
        """Seconds, and those of processor time, of all transfers on this rank."""
        cpu = time.process_time()
        begin = time.perf_counter()
        for work in [work for start in starts for work in start()]:
            finish(work)
        self.synchronize()
        return time.perf_counter() - begin, time.process_time() - cpu

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
