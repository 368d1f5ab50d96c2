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
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from methods import Method, Prepared
from netlab import read_wire_bytes
from workloads import Workload

__all__ = ["Plan"]


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
        loss.backward()
    if plan.optimize:
        prepared.optimizer.step()
    prepared.optimizer.zero_grad()


def _measure(name: str, plan: Plan, rank: int, world_size: int) -> dict[str, object] | None:
    """One cell; what rank 0 knows of it in the end."""
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
    prepared.close()
    if before is None or after is None:
        return None
    wire = after - before
    return {
        "method": name,
        "step_s": ends.diff().tolist(),
        "cpu_s": busy.item(),
        "sent_bytes": [count / plan.steps for count in wire.sent],
        "received_bytes": [count / plan.steps for count in wire.received],
    }


def _wire(rank: int, world_size: int) -> object:
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
    plan = Plan.from_json(args.plan)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world_size, is_master=rank == 0)
    cells = plan.cells()
    with args.out.open("a") if rank == 0 else open(os.devnull, "w") as file:  # noqa: PTH123
        for index, (number, name) in enumerate(cells):
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"cell{index}", store),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
            result = _measure(name, plan, rank, world_size)
            dist.destroy_process_group()
            gc.collect()
            if result is not None:
                file.write(json.dumps({"round": number, **result}) + "\n")
                file.flush()
                steps = sorted(result["step_s"])  # type: ignore[call-overload]
                median_ms = steps[len(steps) // 2] * 1e3
                print(f"[{index + 1}/{len(cells)}] {name:24} {median_ms:8.1f} ms", flush=True)
    sys.stdout.flush()
    # Threads of a rival may still wait for something; nothing is left to do.
    os._exit(0)


if __name__ == "__main__":
    main()
