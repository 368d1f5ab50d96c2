"""Measure what quantization costs in quality on larger and other tasks than `quality.py`.

    python benchmarks/scale.py                                  # all runs, about 2 hours of one core
    python benchmarks/scale.py --tasks vision --methods dense lloyd4
    python benchmarks/scale.py --only-report --figures docs/figures

Four workers in one process, see `simulation.py`. Tasks: `text`, a GPT of 4 million parameters, 2,000
steps of AdamW; `finetune` and `lora`, its weights on C++, all of them or low-rank additions; `vision`,
a small ResNet on digits in clutter, with AdamW and with SGD and momentum; `muon`, the 470 thousand
parameters of `examples/train_text.py` with Muon.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quality_runs import RESULTS, Record, Schedule, markdown, read, train, write
from quality_tasks import Code, CodeLoRA, Digits, Prose, Task
from simulation import Simulation, dense_mean
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from effadam_hook import EfficientAdam, reduced_betas

WORKERS = 4
_LAYERS, _WIDTH = 5, 256
_CHECKPOINT = Path("outputs/scale_text.pt")


@dataclass(frozen=True)
class Method:
    """A method of averaging, with its optimizer.

    Attributes:
        name: Name in tables.
        kind: "dense", "gradient", "preconditioned" or "update".
        quantizer: Quantizer of both directions.
        optimizer: "adamw", "sgd" or "muon"; update mode has its own.
        rate: Factor of the task's learning rate.
        beta1: First beta of Adam.
        second_moment: That of update mode.
        reduced: Whether momentum follows the bits, as of :func:`effadam_hook.reduced_betas`.
    """

    name: str
    kind: str
    quantizer: str = ""
    optimizer: str = "adamw"
    rate: float = 1.0
    beta1: float = 0.9
    second_moment: str = "local"
    reduced: bool = False

    def momentum(self, usual: float) -> float:
        """Return the momentum, from that of the dense run."""
        if not self.reduced:
            return usual
        momentum, _ = reduced_betas((usual, 0.999), self.quantizer)
        return momentum

    def simulate(self, model: nn.Module, lr: float) -> Simulation:
        """Make the simulation of a model."""
        options: dict[str, Any] = {"quantizer": self.quantizer}
        if self.kind == "dense":
            options = {"average": dense_mean}
        options["precondition"] = self.kind == "preconditioned"

        def build(parameters: list[nn.Parameter]) -> list[Optimizer]:
            return self._optimizers(model, parameters, lr * self.rate)

        return Simulation(model, build, WORKERS, **options)

    def _optimizers(
        self, model: nn.Module, parameters: list[nn.Parameter], lr: float
    ) -> list[Optimizer]:
        betas, decay = (self.momentum(self.beta1), 0.999), 0.01
        if self.kind == "update":
            rule = self.second_moment
            return [EfficientAdam(parameters, lr, betas, weight_decay=decay, second_moment=rule)]
        if self.optimizer == "sgd":
            # SGD adds up gradients: without the factor, less momentum would be a smaller rate.
            momentum = self.momentum(0.9)
            lr *= (1 - momentum) / (1 - 0.9)
            return [SGD(parameters, lr, momentum=momentum, weight_decay=5e-4)]
        if self.optimizer == "adamw":
            return [AdamW(parameters, lr, betas, weight_decay=decay, fused=True)]
        hidden = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]
        known = {id(p) for p in hidden}
        others = [p for p in parameters if id(p) not in known]
        # Muon's updates have the size of AdamW's in this scaling, and take its rate.
        muon = torch.optim.Muon(
            hidden,
            lr,
            weight_decay=decay,
            momentum=self.momentum(0.95),
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, AdamW(others, lr, betas, weight_decay=decay)]


_ADAM = (
    Method("dense", "dense"),
    Method("lloyd4", "gradient", "lloyd4"),
    Method("preconditioned lloyd3", "preconditioned", "lloyd3"),
    Method("update lloyd2", "update", "lloyd2"),
    Method("update sign", "update", "sign"),
)
_MATCHED = (
    Method("update lloyd2, matched", "update", "lloyd2", second_moment="matched"),
    Method("update sign, matched", "update", "sign", second_moment="matched"),
)
# Local second moments make smaller steps, and few bits need less momentum: docs/algorithm.md.
_OWN = (
    Method("update lloyd2, 2× rate", "update", "lloyd2", rate=2),
    Method("update sign, 2× rate, β₁ .2", "update", "sign", rate=2, beta1=0.2),
)
# Few bits need less momentum: dense's settings, with reduced_betas().
_REDUCED = (
    Method("lloyd2, reduced β₁", "gradient", "lloyd2", reduced=True),
    Method("preconditioned lloyd2, reduced β₁", "preconditioned", "lloyd2", reduced=True),
    Method("preconditioned sign, reduced β₁", "preconditioned", "sign", reduced=True),
)
_TEXT = (
    *_ADAM[:3],
    *_REDUCED,
    Method("dense, 2× rate", "dense", rate=2),
    Method("lloyd4, 2× rate", "gradient", "lloyd4", rate=2),
    *_MATCHED,
    *_OWN,
)
_START = "dense, 2× rate"
"""The method whose weights are trained further by the tasks `finetune` and `lora`."""


def _without_adam(optimizer: str) -> tuple[Method, ...]:
    return (
        Method("dense", "dense", optimizer=optimizer),
        Method("lloyd4", "gradient", "lloyd4", optimizer),
        Method("lloyd2", "gradient", "lloyd2", optimizer),
        Method("lloyd2, reduced momentum", "gradient", "lloyd2", optimizer, reduced=True),
    )


@dataclass(frozen=True)
class Group:
    """Runs of one task.

    Attributes:
        name: Name of the task.
        title: Title in tables and figures.
        make: Makes the task.
        schedule: Steps and learning rate.
        lr: Learning rate of the dense run.
        methods: The methods.
    """

    name: str
    title: str
    make: Any
    schedule: Schedule
    lr: float
    methods: tuple[Method, ...] = field(default=_ADAM)

    def run_name(self, method: Method, seed: int) -> str:
        """Return the name of a run."""
        return f"{self.name}: {method.name}, seed {seed}"


@cache
def _prose() -> Prose:
    return Prose(_LAYERS, _WIDTH, batch=3)


@cache
def _digits() -> Digits:
    return Digits(batch=16, width=24)


GROUPS = (
    Group("text", "text, 4.1 M", _prose, Schedule(2000, 100, 125), 1.5e-3, _TEXT),
    Group(
        "vision",
        "digits, AdamW",
        _digits,
        Schedule(800, 50, 50),
        3e-3,
        (*_ADAM[:3], *_REDUCED, *_ADAM[3:], *_MATCHED, *_OWN),
    ),
    Group(
        "vision sgd",
        "digits, SGD",
        _digits,
        Schedule(800, 50, 50),
        0.1,
        _without_adam("sgd"),
    ),
    Group(
        "muon",
        "text, .47 M, Muon",
        cache(lambda: Prose(2, 128, batch=8)),
        Schedule(600, 50, 50),
        6e-3,
        _without_adam("muon"),
    ),
    Group(
        "finetune",
        "C++ from Python",
        cache(lambda: Code(_CHECKPOINT, _LAYERS, _WIDTH, batch=3)),
        Schedule(200, 20, 20),
        1e-3,
        (*_ADAM[:3], *_REDUCED[:2], _ADAM[3], *_MATCHED, _OWN[0]),
    ),
    Group(
        "lora",
        "the same, LoRA",
        cache(lambda: CodeLoRA(_CHECKPOINT, _LAYERS, _WIDTH, batch=3)),
        Schedule(200, 20, 20),
        3e-3,
        (*_ADAM[:3], *_REDUCED[:2], _ADAM[3], *_MATCHED, _OWN[0]),
    ),
)


def run(group: Group, method: Method, seed: int, path: Path) -> None:
    """Train, and append the record."""
    task: Task = group.make()
    lr = group.lr * method.rate
    settings = f"lr {lr:g}, beta1 {method.beta1}, {group.schedule}"
    record, model = train(
        group.run_name(method, seed),
        settings,
        task,
        lambda model: method.simulate(model, group.lr),
        WORKERS,
        group.schedule,
        seed,
    )
    write(path, record)
    if group.name == "text" and method.name == _START and seed == 0:
        _CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), _CHECKPOINT)


def report(records: dict[str, Record], groups: Iterable[Group], seeds: list[int]) -> str:
    """Format one table of all tasks."""
    rows = []
    for group in groups:
        found = [
            {
                seed: records[name]
                for seed in seeds
                if (name := group.run_name(method, seed)) in records
            }
            for method in group.methods
        ]
        dense = found[0]
        for method, runs in zip(group.methods, found, strict=True):
            done = list(runs.values())
            if not done:
                continue
            loss = _mean(each.losses[-1] for each in done)
            accuracy = _mean(each.accuracies[-1] for each in done)
            ratio = 8 * done[0].numel / done[0].bytes_per_step
            excess = ""
            if runs is not dense and runs.keys() <= dense.keys():
                # Of the same seeds, which have the same initial weights and data.
                excess = (
                    f"{(loss / _mean(dense[seed].losses[-1] for seed in runs) - 1) * 100:+.1f} %"
                )
            rows.append(
                (
                    f"{group.title}: {method.name}",
                    f"{loss:.4f}",
                    excess,
                    f"{accuracy * 100:.1f} %",
                    f"{done[0].megabytes[-1]:.0f}",
                    f"{ratio:.1f}×",
                    f"{len(done)}",
                )
            )
    header = ("task and method", "final loss", "against dense", "accuracy", "MB", "less", "seeds")
    return markdown(header, rows)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def draw(records: dict[str, Record], groups: Iterable[Group], path: Path) -> None:
    """Draw the loss against steps and against bytes, one row for each task, with the first seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [group for group in groups if group.run_name(group.methods[0], 0) in records]
    figure, rows = plt.subplots(
        len(drawn), 2, figsize=(9, 2.6 * len(drawn)), squeeze=False, sharey="row"
    )
    for row, group in zip(rows, drawn, strict=True):
        lowest = math.inf
        for method in group.methods:
            record = records.get(group.run_name(method, 0))
            if record is None:
                continue
            lowest = min(lowest, *record.losses)
            row[0].plot(record.steps, record.losses, label=method.name, linewidth=1)
            row[1].plot(record.megabytes, record.losses, label=method.name, linewidth=1)
        row[0].set_ylabel(f"{group.title}\nvalidation loss")
        row[0].set_ylim(lowest * 0.98, lowest * 1.5)
        row[0].set_xlabel("steps")
        row[1].set_xlabel("MB of one worker, both directions")
        row[1].set_xscale("log")
        row[0].legend(fontsize=6, loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=[group.name for group in GROUPS])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--lr", type=float, help="another learning rate of the dense run, for a search"
    )
    parser.add_argument("--steps", type=int, help="another number of steps, for a search")
    parser.add_argument("--file", type=Path, default=RESULTS / "scale.jsonl")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw scale.png in this folder")
    args = parser.parse_args()
    if (args.lr or args.steps) and args.file == RESULTS / "scale.jsonl":
        parser.error("--lr and --steps need a --file of their own")
    groups = [group for group in GROUPS if not args.tasks or group.name in args.tasks]
    if args.lr or args.steps:
        groups = [
            replace(
                each,
                name=f"{each.name}, lr {args.lr or each.lr:g}",
                lr=args.lr or each.lr,
                schedule=replace(each.schedule, steps=args.steps or each.schedule.steps),
            )
            for each in groups
        ]
    torch.set_num_threads(1)
    for seed in args.seeds:
        for group in groups:
            for method in group.methods:
                chosen = not args.methods or method.name in args.methods
                missing = group.run_name(method, seed) not in read(args.file)
                if chosen and missing and not args.only_report:
                    run(group, method, seed, args.file)
    records = read(args.file)
    print(report(records, groups, args.seeds))
    if args.figures:
        draw(records, groups, args.figures / "scale.png")


if __name__ == "__main__":
    sys.exit(main())
