"""Measure whether update mode does at AdamW's own settings what DDP with AdamW does.

    python benchmarks/matched_steps.py                     # 2, 4 and 8 workers, two seeds: some hours
    python benchmarks/matched_steps.py --tasks gru --workers 2 --seeds 0
    python benchmarks/matched_steps.py --only-report

Simulated workers, see `simulation.py`, with 8 sequences of 64 bytes each: `text` is the model of
`examples/train_text.py`, `gru` a recurrent one on the same bytes, both with 600 steps of AdamW, 6e-3,
betas .9 .999 and weight decay .01, like `dense` itself. Controls: dense with the β1 that matching gives
to `lloyd2` and `sign`, and update mode without matching ("local").
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quality_runs import RESULTS, Record, Schedule, markdown, read, train, write
from quality_tasks import Prose, Recurrent, Task
from simulation import Simulation, dense_mean
from torch import nn
from torch.optim import AdamW, Optimizer

from effadam_hook import EfficientAdam
from effadam_hook.wire.quantizers import get_quantizer

_LR, _BETA1 = 6e-3, 0.9
_SCHEDULE = Schedule(600, 50, 100)
_FILE = RESULTS / "matched_steps.jsonl"


@dataclass(frozen=True)
class Method:
    """A method of averaging.

    Attributes:
        name: Name in tables.
        quantizer: Quantizer of both directions of update mode; None for AdamW on the dense mean.
        second_moment: That of update mode.
        beta1: First beta.
    """

    name: str
    quantizer: str | None = None
    second_moment: str = "matched"
    beta1: float = _BETA1

    def simulate(self, model: nn.Module, workers: int) -> Simulation:
        """Make the simulation of a model."""
        betas = (self.beta1, 0.999)

        def build(parameters: list[nn.Parameter]) -> list[Optimizer]:
            if self.quantizer is None:
                return [AdamW(parameters, _LR, betas, weight_decay=0.01, fused=True)]
            settings: dict[str, Any] = {"weight_decay": 0.01, "second_moment": self.second_moment}
            return [EfficientAdam(parameters, _LR, betas, **settings)]

        if self.quantizer is None:
            return Simulation(model, build, workers, average=dense_mean)
        return Simulation(model, build, workers, quantizer=self.quantizer)


def _reduced(quantizer: str) -> Method:
    beta1 = round(_BETA1 * get_quantizer(quantizer).energy ** 2, 2)
    return Method(f"dense, β₁ {beta1}", beta1=beta1)


METHODS = (
    Method("dense"),
    Method("none", "none"),
    Method("lloyd4", "lloyd4"),
    Method("lloyd2", "lloyd2"),
    Method("sign", "sign"),
    _reduced("lloyd2"),
    _reduced("sign"),
    Method("none, local", "none", "local"),
    Method("lloyd2, local", "lloyd2", "local"),
    Method("sign, local", "sign", "local"),
)
TASKS = {"text": cache(lambda: Prose(2, 128, 8)), "gru": cache(lambda: Recurrent(128, 8))}


def _run_name(task: str, workers: int, seed: int, method: Method) -> str:
    return f"{task}: {workers} workers, {method.name}, seed {seed}"


def run(task: str, workers: int, seed: int, method: Method, path: Path) -> None:
    """Train, and append the record."""
    made: Task = TASKS[task]()
    name = _run_name(task, workers, seed, method)
    settings = f"lr {_LR:g}, beta1 {method.beta1}, {_SCHEDULE}"
    build = lambda model: method.simulate(model, workers)  # noqa: E731
    record, _ = train(name, settings, made, build, workers, _SCHEDULE, seed)
    write(path, record)


def report(records: dict[str, Record], options: argparse.Namespace) -> str:
    """Format a table: a row for every task, number of workers and seed."""
    rows = []
    for task in options.tasks:
        for workers in options.workers:
            for seed in options.seeds:
                row = [f"{task}, {workers} workers, seed {seed}"]
                for method in METHODS:
                    record = records.get(_run_name(task, workers, seed, method))
                    row.append("" if record is None else f"{record.losses[-1]:.4f}")
                if any(row[1:]):
                    rows.append(row)
    return markdown(("final loss", *(method.name for method in METHODS)), rows)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--file", type=Path, default=_FILE)
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for workers in options.workers:
            for task in options.tasks:
                for method in METHODS:
                    chosen = not options.methods or method.name in options.methods
                    name = _run_name(task, workers, seed, method)
                    if chosen and not options.only_report and name not in read(options.file):
                        run(task, workers, seed, method, options.file)
    print(report(read(options.file), options))


if __name__ == "__main__":
    sys.exit(main())
