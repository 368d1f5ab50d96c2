"""Measure what few bits cost at the settings of DDP with AdamW.

    python benchmarks/matched_steps.py                     # 2, 4 and 8 workers, two seeds: some hours
    python benchmarks/matched_steps.py --tasks gru --workers 2 --seeds 0
    python benchmarks/matched_steps.py --only-report

Simulated workers, see `simulation.py`, with 8 sequences of 64 bytes each: `text` is the model of
`examples/train_text.py`, `gru` a recurrent one on the same bytes, both with 600 steps of AdamW, 6e-3,
betas .9 .999 and weight decay .01, like `dense` itself. Update mode has matched steps, the gradient
modes have the betas of `reduced_betas`. Controls: dense with the same betas, and update mode without
matching ("local").
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

from effadam_hook import EfficientAdam, reduced_betas

_LR, _BETA1 = 6e-3, 0.9
_SCHEDULE = Schedule(600, 50, 100)
_FILE = RESULTS / "matched_steps.jsonl"


@dataclass(frozen=True)
class Method:
    """A method of averaging.

    Attributes:
        name: Name in tables.
        kind: "dense", "gradient", "preconditioned" or "update".
        quantizer: Quantizer of both directions.
        second_moment: That of update mode.
        beta1: First beta.
    """

    name: str
    kind: str
    quantizer: str = "none"
    second_moment: str = "matched"
    beta1: float = _BETA1

    def simulate(self, model: nn.Module, workers: int) -> Simulation:
        """Make the simulation of a model."""
        betas = (self.beta1, 0.999)

        def build(parameters: list[nn.Parameter]) -> list[Optimizer]:
            if self.kind != "update":
                return [AdamW(parameters, _LR, betas, weight_decay=0.01, fused=True)]
            settings: dict[str, Any] = {"weight_decay": 0.01, "second_moment": self.second_moment}
            return [EfficientAdam(parameters, _LR, betas, **settings)]

        if self.kind == "dense":
            return Simulation(model, build, workers, average=dense_mean)
        options: dict[str, Any] = {"precondition": self.kind == "preconditioned"}
        return Simulation(model, build, workers, quantizer=self.quantizer, **options)


def _reduced(kind: str, quantizer: str) -> Method:
    beta1, _ = reduced_betas((_BETA1, 0.999), quantizer)
    label = "dense" if kind == "dense" else f"{kind} {quantizer}"
    return Method(f"{label}, β₁ {beta1}", kind, quantizer, beta1=beta1)


METHODS = (
    Method("dense", "dense"),
    _reduced("gradient", "lloyd2"),
    _reduced("gradient", "sign"),
    _reduced("preconditioned", "lloyd2"),
    _reduced("preconditioned", "sign"),
    Method("update none", "update", "none"),
    Method("update lloyd4", "update", "lloyd4"),
    Method("update lloyd2", "update", "lloyd2"),
    Method("update sign", "update", "sign"),
    _reduced("dense", "lloyd2"),
    _reduced("dense", "sign"),
    Method("update none, local", "update", "none", "local"),
    Method("update lloyd2, local", "update", "lloyd2", "local"),
    Method("update sign, local", "update", "sign", "local"),
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
    """Format a table: losses of dense, and below them the mean differences from dense by seed."""
    columns = [(task, workers) for task in options.tasks for workers in options.workers]
    rows = []
    for method in METHODS:
        row = [method.name]
        for task, workers in columns:
            pairs = []
            for seed in options.seeds:
                one = records.get(_run_name(task, workers, seed, method))
                dense = records.get(_run_name(task, workers, seed, METHODS[0]))
                if one and dense:
                    pairs.append((one.losses[-1], dense.losses[-1]))
            row.append(_cell(pairs, method is METHODS[0]))
        if any(row[1:]):
            rows.append(row)
    return markdown(("", *(f"{task}, {workers} workers" for task, workers in columns)), rows)


def _cell(pairs: list[tuple[float, float]], is_dense: bool) -> str:
    if not pairs:
        return ""
    seeds = f" ({len(pairs)})" if len(pairs) > 1 else ""
    if is_dense:
        return f"{sum(loss for loss, _ in pairs) / len(pairs):.4f}{seeds}"
    excess = sum(loss / dense - 1 for loss, dense in pairs) / len(pairs)
    return f"{100 * excess:+.1f} %{seeds}"


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
