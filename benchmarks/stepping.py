"""One rank's side of a benchmark: train by one method after another and write down when steps ended.

Started by :mod:`end_to_end` on every host of a lab. What the ranks share is one store; every cell, a
method in a round, gets a process group of its own, so that no method meets another's threads.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
from environment import kernel_build
from methods import Method, Prepared
from netlab import WireBytes, read_wire_bytes
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from workloads import Workload

__all__ = ["Cell", "KernelsError", "KernelsUsed", "Plan", "check_kernels"]


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
        step_s: Seconds of each step.
        cpu_s: Seconds of processor time of a step, all ranks together.
        sent_bytes: Bytes of a step, by host, as its link counts them.
        received_bytes: The same for the way down.
    """

    round: int
    method: str
    kernels: str
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
    workload: Workload
    optimize: bool = True

    def cells(self) -> list[tuple[int, str]]:
        """Round and method of every cell, each round starting with another method."""
        cells = []
        for number in range(self.rounds):
            start = number * len(self.methods) // self.rounds
            turned = self.methods[start:] + self.methods[:start]
            cells += [(number, name) for name in turned]
        return cells

    def to_json(self) -> str:
        """As text, for the command line of the ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """From what :meth:`to_json` returned."""
        values = json.loads(text)
        values["workload"] = Workload(**values["workload"])
        values["methods"] = tuple(values["methods"])
        return cls(**values)


def _step(prepared: Prepared, plan: Plan, batch: torch.Tensor) -> None:
    with prepared.scope():
        loss = plan.workload.loss(prepared.model, batch)
    with prepared.scope():
        loss.backward()  # type: ignore[no-untyped-call]
    if plan.optimize:
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


def _kernels(name: str, prepared: Prepared, build: str, world_size: int) -> str:
    """What a cell computed with, checked between all ranks."""
    if prepared.state is None:
        return ""
    lines = (line.split(maxsplit=1) for line in prepared.state.summary().splitlines())
    (running,) = [line[1] for line in lines if line[0] == "kernels"]
    used: list[KernelsUsed] = [KernelsUsed("", "", "")] * world_size
    dist.all_gather_object(used, KernelsUsed(running, build, kernel_build()))
    return check_kernels(name, used)


def _measure(cell: tuple[int, str], plan: Plan, build: str) -> Cell | None:
    """One cell; what rank 0 knows of it in the end."""
    number, name = cell
    rank, world_size = dist.get_rank(), dist.get_world_size()
    prepared = Method.parse(name).prepare(plan.workload.model())
    batch = plan.workload.batch(rank)
    for _ in range(plan.warmup):
        _step(prepared, plan, batch)
    ends = torch.empty(plan.steps + 1, dtype=torch.float64)
    before = _wire(rank, world_size)
    cpu = -time.process_time()
    ends[0] = time.monotonic()
    for index in range(plan.steps):
        _step(prepared, plan, batch)
        ends[index + 1] = time.monotonic()
    cpu += time.process_time()
    after = _wire(rank, world_size)
    busy = torch.tensor([cpu / plan.steps], dtype=torch.float64)
    dist.all_reduce(busy)
    # All hosts have one clock; a step has ended when it has on the last of them.
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    kernels = _kernels(name, prepared, build, world_size)
    prepared.close()
    if before is None or after is None:
        return None
    wire = after - before
    return {
        "round": number,
        "method": name,
        "kernels": kernels,
        "step_s": ends.diff().tolist(),
        "cpu_s": busy.item(),
        "sent_bytes": [count / plan.steps for count in wire.sent],
        "received_bytes": [count / plan.steps for count in wire.received],
    }


def _wire(rank: int, world_size: int) -> WireBytes | None:
    """The counters on rank 0, while nobody sends."""
    dist.barrier()
    reading = read_wire_bytes(os.environ["NETLAB_ID"], world_size) if rank == 0 else None
    dist.barrier()
    return reading


def main() -> None:
    """Run the cells of a plan; rank 0 writes one line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plan")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    build = kernel_build()
    plan = Plan.from_json(args.plan)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size, is_master=rank == 0)
    cells = plan.cells()
    with args.out.open("a") if rank == 0 else open(os.devnull, "w") as file:  # noqa: PTH123
        for index, cell in enumerate(cells):
            dist.init_process_group(
                "gloo",
                store=PrefixStore(f"cell{index}", store),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
            result = _measure(cell, plan, build)
            dist.destroy_process_group()
            gc.collect()
            if result is not None:
                file.write(json.dumps(result) + "\n")
                file.flush()
                steps = sorted(result["step_s"])
                median_ms = steps[len(steps) // 2] * 1e3
                print(f"[{index + 1}/{len(cells)}] {cell[1]:24} {median_ms:8.1f} ms", flush=True)
    sys.stdout.flush()
    # Threads of a rival may still wait for something; nothing is left to do.
    os._exit(0)


if __name__ == "__main__":
    main()
