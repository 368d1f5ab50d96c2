"""Benchmark run: train with one method after another and record when steps end.

The ranks share one store. Every cell, a method in a round, has a process group of its own, so that
threads of one method do not affect the next.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from effadam_hook.cli.environment import kernel_build
from effadam_hook.cli.kernel_check import KernelsUsed, check_kernels
from effadam_hook.cli.methods import Prepared, prepare
from effadam_hook.exchange.probe import Probe
from effadam_hook.planner.method import Method
from effadam_hook.planner.workloads import TrainingTask, to_device

__all__ = ["BenchmarkRun", "Cell", "LinkCounters", "between_ends", "run_cells", "step"]

_TIMEOUT = timedelta(seconds=120)

LinkCounters = Callable[[Probe], "tuple[list[int], list[int]]"]
"""Function that returns the bytes sent and received so far by each host; a collective operation."""


class Cell(TypedDict):
    """Result of one method in one round.

    Attributes:
        round: Number of the round.
        method: Name of the method.
        kernels: Implementation and build of the kernels; empty for methods of other projects.
        topology: Topology and route of the messages; empty for methods of other projects.
        step_s: Seconds of each step.
        cpu_s: Processor time per step in seconds, all ranks together.
        sent_bytes: Bytes per step that each host sent, as counted by its link.
        received_bytes: Bytes per step that each host received, likewise.
    """

    round: int
    method: str
    kernels: str
    topology: str
    step_s: list[float]
    cpu_s: float
    sent_bytes: list[float]
    received_bytes: list[float]


@dataclass(frozen=True)
class BenchmarkRun:
    """Methods, repetitions and training task of a benchmark run, equal on all ranks.

    Attributes:
        methods: Names of the methods, in the order of the first round.
        rounds: Number of times that each method is measured.
        warmup: Untimed steps at the start of every cell.
        steps: Timed steps of every cell.
        workload: The training task.
        optimize: Whether a step includes the optimizer's step.
    """

    methods: tuple[str, ...]
    rounds: int
    warmup: int
    steps: int
    workload: TrainingTask
    optimize: bool = True

    def cells(self) -> list[tuple[int, str]]:
        """Return round and method of every cell; each round starts with another method."""
        cells = []
        for number in range(self.rounds):
            start = number * len(self.methods) // self.rounds
            rotated = self.methods[start:] + self.methods[:start]
            cells += [(number, name) for name in rotated]
        return cells


def step(prepared: Prepared, workload: TrainingTask, batch: Any, optimize: bool = True) -> None:
    """Run one training step.

    Args:
        prepared: Model and optimizer.
        workload: The training task.
        batch: The batch of this rank.
        optimize: Whether to run the optimizer's step.
    """
    with prepared.scope():
        loss = workload.loss(prepared.model, batch)
    with prepared.scope():
        workload.backward(loss)
    if optimize:
        prepared.optimizer.step()
    prepared.optimizer.zero_grad()


def run_cells(
    run: BenchmarkRun,
    backend: str,
    device: torch.device,
    counters: LinkCounters,
    joined: tuple[Store, int, int] | None = None,
) -> Iterator[Cell]:
    """Run the cells of a benchmark run; a collective operation.

    Args:
        run: The benchmark run.
        backend: Backend of the process groups.
        device: Device of this rank.
        counters: Function that reads the links' counters.
        joined: Store of the ranks, rank of this process, and number of ranks; None to take them from
            the environment.

    Yields:
        The cells, in their order, equal on every rank.
    """
    build = kernel_build()
    store, rank, world_size = joined or next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    for index, cell in enumerate(run.cells()):
        dist.init_process_group(
            backend,
            store=PrefixStore(f"cell{index}", store),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        try:
            result = _measure(cell, run, device, counters, build)
        finally:
            dist.destroy_process_group()
        gc.collect()
        yield result


def _measure(
    cell: tuple[int, str],
    run: BenchmarkRun,
    device: torch.device,
    counters: LinkCounters,
    build: str,
) -> Cell:
    number, name = cell
    group = dist.group.WORLD
    assert group is not None
    probe = Probe(group, device)
    prepared = prepare(Method.parse(name), run.workload.model().to(device))
    batch = to_device(run.workload.batch(probe.rank), device)
    for _ in range(run.warmup):
        step(prepared, run.workload, batch, run.optimize)
    sent, received = counters(probe)
    cpu = -time.process_time()
    begin = time.perf_counter()
    ends = []
    for _ in range(run.steps):
        step(prepared, run.workload, batch, run.optimize)
        probe.synchronize()
        ends.append(time.perf_counter() - begin)
    cpu += time.process_time()
    sent_after, received_after = counters(probe)
    kernels = _kernels(name, prepared, build, probe)
    topology = _summary_line(prepared, "topology")
    prepared.close()
    shared = probe.share({"ends": ends, "cpu": cpu / run.steps})
    return {
        "round": number,
        "method": name,
        "kernels": kernels,
        "topology": topology,
        "step_s": between_ends([one["ends"] for one in shared]),
        "cpu_s": sum(one["cpu"] for one in shared),
        "sent_bytes": _each_step(sent, sent_after, run.steps),
        "received_bytes": _each_step(received, received_after, run.steps),
    }


def between_ends(ends: Sequence[Sequence[float]]) -> list[float]:
    """Compute the durations of consecutive pieces of work from the times at which ranks ended them.

    Args:
        ends: Seconds from the common start to the end of each piece, by rank. A piece ends when the
            last rank ends it.

    Returns:
        Seconds of each piece.
    """
    last = [max(times) for times in zip(*ends, strict=True)]
    return [b - a for a, b in pairwise([0.0, *last])]


def _each_step(before: list[int], after: list[int], steps: int) -> list[float]:
    return [(b - a) / steps for a, b in zip(before, after, strict=True)]


def _kernels(name: str, prepared: Prepared, build: str, probe: Probe) -> str:
    """Return the kernels of a cell, after comparing all ranks."""
    if prepared.state is None:
        return ""
    used = probe.share([_summary_line(prepared, "kernels"), build, kernel_build()])
    return check_kernels(name, [KernelsUsed(*one) for one in used])


def _summary_line(prepared: Prepared, about: str) -> str:
    """Return a line of the state's summary; empty if there is no state."""
    if prepared.state is None:
        return ""
    lines = (line.split(maxsplit=1) for line in prepared.state.summary().splitlines())
    (text,) = [line[1] for line in lines if line[0] == about]
    return text
