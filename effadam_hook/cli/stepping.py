"""Trains by one method after another and writes down when steps ended.

What the ranks share is one store; every cell, a method in a round, gets a process group of its own,
so that no method meets another's threads.
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
from effadam_hook.cli.methods import Prepared, prepare
from effadam_hook.exchange.probe import Probe
from effadam_hook.planner.method import Method
from effadam_hook.planner.workloads import Trained, to_device

__all__ = [
    "Cell",
    "Counts",
    "KernelsError",
    "KernelsUsed",
    "Plan",
    "between_ends",
    "check_kernels",
    "run_cells",
    "step",
]

_TIMEOUT = timedelta(seconds=120)

Counts = Callable[[Probe], "tuple[list[int], list[int]]"]
"""Bytes that every host has sent and received so far; a collective operation."""


class KernelsError(RuntimeError):
    """This project's methods did not run what is to be measured."""


@dataclass(frozen=True)
class KernelsUsed:
    """What one rank computed with.

    Attributes:
        name: Name of the implementation, from the state's ``summary()``.
        build_before: The compiled library beside the package when the rank started.
        build_after: The same when the cell ended. As the library is loaded in between, it is known
            to be the one that ran if the two are equal.
    """

    name: str
    build_before: str
    build_after: str


class Cell(TypedDict):
    """What came out for one method in one round.

    Attributes:
        round: Number of the round.
        method: The method's name.
        kernels: Implementation and build that it computed with; empty if it is not ours.
        topology: Topology, and which way messages took; empty if it is not ours.
        step_s: Seconds of each step.
        cpu_s: Seconds of processor time of a step, all ranks together.
        sent_bytes: Bytes of a step, by host, as its link counts them.
        received_bytes: The same for the way down.
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
class Plan:
    """What all ranks are to do.

    Attributes:
        methods: Names of methods, in the order of the first round.
        rounds: How often each is measured.
        warmup: Steps before the clock starts, in every cell.
        steps: Steps on the clock, in every cell.
        workload: What is trained.
        optimize: Whether a step ends with the optimizer's.
    """

    methods: tuple[str, ...]
    rounds: int
    warmup: int
    steps: int
    workload: Trained
    optimize: bool = True

    def cells(self) -> list[tuple[int, str]]:
        """Round and method of every cell, each round starting with another method."""
        cells = []
        for number in range(self.rounds):
            start = number * len(self.methods) // self.rounds
            turned = self.methods[start:] + self.methods[:start]
            cells += [(number, name) for name in turned]
        return cells


def step(prepared: Prepared, workload: Trained, batch: Any, optimize: bool = True) -> None:
    """One step of training.

    Args:
        prepared: Model and optimizer.
        workload: What is trained.
        batch: Its batch.
        optimize: Whether the optimizer makes its step.
    """
    with prepared.scope():
        loss = workload.loss(prepared.model, batch)
    with prepared.scope():
        workload.backward(loss)
    if optimize:
        prepared.optimizer.step()
    prepared.optimizer.zero_grad()


def check_kernels(method: str, used: Sequence[KernelsUsed]) -> str:
    """Check that all ranks ran the same fused kernels, from one build that stayed in its place.

    Args:
        method: Name of the method, for the message.
        used: What the ranks computed with, in their order.

    Returns:
        Implementation and build, for the record.

    Raises:
        KernelsError: If not; the times would be those of something else.
    """
    names = sorted({one.name for one in used})
    builds = sorted({build for one in used for build in (one.build_before, one.build_after)})
    if any(name.split()[0] == "reference" for name in names):
        raise KernelsError(
            f"{method} ran on the reference kernels: {', '.join(one.name for one in used)}, by rank. "
            "Must be the fused ones, or the times say nothing: leave EFFADAM_KERNELS unset, and see "
            "the warning of the first such rank for what is missing."
        )
    if len(names) > 1 or len(builds) > 1:
        raise KernelsError(
            f"{method} did not run on one build of the kernels: found {', '.join(names)} with the "
            f"libraries {', '.join(builds)}. Must be one on all ranks, from their start to their end: "
            "do not build the package while it is measured."
        )
    return f"{names[0]} {builds[0]}"


def run_cells(
    plan: Plan,
    backend: str,
    device: torch.device,
    counts: Counts,
    meeting: tuple[Store, int, int] | None = None,
) -> Iterator[Cell]:
    """Run the cells of a plan on this rank; every rank must do so.

    Args:
        plan: What to run.
        backend: Of the process groups.
        device: Where this rank computes.
        counts: Reads the links' counters.
        meeting: The ranks' store, this rank, and how many there are; None asks the environment.

    Yields:
        One cell after the other, the same on every rank.
    """
    build = kernel_build()
    store, rank, world_size = meeting or next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    for index, cell in enumerate(plan.cells()):
        dist.init_process_group(
            backend,
            store=PrefixStore(f"cell{index}", store),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        try:
            result = _measure(cell, plan, device, counts, build)
        finally:
            dist.destroy_process_group()
        gc.collect()
        yield result


def _measure(
    cell: tuple[int, str], plan: Plan, device: torch.device, counts: Counts, build: str
) -> Cell:
    number, name = cell
    group = dist.group.WORLD
    assert group is not None
    probe = Probe(group, device)
    prepared = prepare(Method.parse(name), plan.workload.model().to(device))
    batch = to_device(plan.workload.batch(probe.rank), device)
    for _ in range(plan.warmup):
        step(prepared, plan.workload, batch, plan.optimize)
    sent, received = counts(probe)
    cpu = -time.process_time()
    begin = time.perf_counter()
    ends = []
    for _ in range(plan.steps):
        step(prepared, plan.workload, batch, plan.optimize)
        probe.synchronize()
        ends.append(time.perf_counter() - begin)
    cpu += time.process_time()
    sent_after, received_after = counts(probe)
    kernels = _kernels(name, prepared, build, probe)
    topology = _summary_line(prepared, "topology")
    prepared.close()
    shared = probe.share({"ends": ends, "cpu": cpu / plan.steps})
    return {
        "round": number,
        "method": name,
        "kernels": kernels,
        "topology": topology,
        "step_s": between_ends([one["ends"] for one in shared]),  # from the counters' reading on
        "cpu_s": sum(one["cpu"] for one in shared),
        "sent_bytes": _each_step(sent, sent_after, plan.steps),
        "received_bytes": _each_step(received, received_after, plan.steps),
    }


def between_ends(ends: Sequence[Sequence[float]]) -> list[float]:
    """How long each of several things in a row took, all ranks together.

    Args:
        ends: By rank, seconds from the common begin to the end of each; one has ended when it has on
            the last rank.

    Returns:
        Seconds of each.
    """
    last = [max(times) for times in zip(*ends, strict=True)]
    return [b - a for a, b in pairwise([0.0, *last])]


def _each_step(before: list[int], after: list[int], steps: int) -> list[float]:
    return [(b - a) / steps for a, b in zip(before, after, strict=True)]


def _kernels(name: str, prepared: Prepared, build: str, probe: Probe) -> str:
    """What a cell computed with, checked between all ranks."""
    if prepared.state is None:
        return ""
    used = probe.share([_summary_line(prepared, "kernels"), build, kernel_build()])
    return check_kernels(name, [KernelsUsed(*one) for one in used])


def _summary_line(prepared: Prepared, about: str) -> str:
    """A line of the state's summary; empty if there is no state."""
    if prepared.state is None:
        return ""
    lines = (line.split(maxsplit=1) for line in prepared.state.summary().splitlines())
    (found,) = [line[1] for line in lines if line[0] == about]
    return found
