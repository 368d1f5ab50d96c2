"""Compare blocks that follow the rows of a model with blocks of 256 elements.

    python benchmarks/block_sizes.py                      # about an hour of one core
    python benchmarks/block_sizes.py --only-report

Four workers in one process, see `simulation.py`, in gradient mode: `text`, the GPT of
`examples/train_text.py` with rows of 128 and 512 elements, and `digits`, a small ResNet. All runs of a
task have the settings of its dense run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_runs import RESULTS, Record, Schedule, markdown, read, train, write
from quality_tasks import Digits, Prose, Task
from simulation import Simulation, dense_mean
from torch import nn
from torch.optim import AdamW

WORKERS = 4
_TASKS: dict[str, tuple[Callable[[], Task], Schedule, float]] = {
    "text": (cache(lambda: Prose(2, 128, batch=8)), Schedule(600, 50, 50), 6e-3),
    "digits": (cache(lambda: Digits(batch=16, width=24)), Schedule(800, 50, 50), 3e-3),
}
_METHODS: dict[str, dict[str, Any]] = {
    "dense": {"average": dense_mean},
    "lloyd2, 256": {"quantizer": "lloyd2", "block_size": 256},
    "lloyd2, rows": {"quantizer": "lloyd2"},
    "lloyd3, 256": {"quantizer": "lloyd3", "block_size": 256},
    "lloyd3, rows": {"quantizer": "lloyd3"},
}


def _name(task: str, method: str, seed: int) -> str:
    return f"{task}: {method}, seed {seed}"


def run(task: str, method: str, seed: int, path: Path) -> None:
    """Train, and append the record."""
    make, schedule, lr = _TASKS[task]

    def simulate(model: nn.Module) -> Simulation:
        def build(parameters: list[nn.Parameter]) -> list[AdamW]:
            return [AdamW(parameters, lr, weight_decay=0.01, fused=True)]

        return Simulation(model, build, WORKERS, **_METHODS[method])

    name, settings = _name(task, method, seed), f"lr {lr:g}, beta1 0.9, {schedule}"
    write(path, train(name, settings, make(), simulate, WORKERS, schedule, seed)[0])


def report(records: dict[str, Record], seeds: list[int]) -> str:
    """Format the table."""
    rows = []
    for task in _TASKS:
        for method in _METHODS:
            runs = [records[n] for s in seeds if (n := _name(task, method, s)) in records]
            pairs = [
                (each, records.get(_name(task, "dense", s)))
                for each, s in zip(runs, seeds, strict=False)
            ]
            excess = [each.losses[-1] - dense.losses[-1] for each, dense in pairs if dense]
            if not runs:
                continue
            rows.append(
                (
                    f"{task}: {method}",
                    f"{mean(each.losses[-1] for each in runs):.4f}",
                    f"{mean(excess):+.4f}" if excess and method != "dense" else "",
                    f"{runs[0].bytes_per_step / 1e3:.1f}",
                    f"{len(runs)}",
                )
            )
    return markdown(("task and method", "final loss", "against dense", "kB a step", "seeds"), rows)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(_TASKS), default=list(_TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--file", type=Path, default=RESULTS / "block_sizes.jsonl")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if args.only_report else args.seeds:
        for task in args.tasks:
            for method in _METHODS:
                if _name(task, method, seed) not in read(args.file):
                    run(task, method, seed, args.file)
    print(report(read(args.file), args.seeds))


if __name__ == "__main__":
    sys.exit(main())
