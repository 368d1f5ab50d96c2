"""``effadam bench``: train with every method on the given ranks, and compare step times."""

from __future__ import annotations

import argparse

from effadam_hook.cli.benchmark_run import BenchmarkRun, Cell, run_cells
from effadam_hook.cli.conclusion import conclusion_of
from effadam_hook.cli.environment import environment
from effadam_hook.cli.interface import InterfaceCounter
from effadam_hook.cli.methods import read_methods
from effadam_hook.cli.ranks import backend_for, check_launched, pick_device, rank_here
from effadam_hook.cli.rendezvous import check_command_lines
from effadam_hook.cli.rows import Row, dense_method, rows_of
from effadam_hook.cli.ui import Screen
from effadam_hook.errors import CommandError
from effadam_hook.planner.method import Method
from effadam_hook.planner.workloads import TrainingTask, UserModel, Workload

__all__ = ["add_bench", "run_bench"]

_METHODS = "none,fp32,fp16,{lloyd4,lloyd2}"


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--methods", default=_METHODS, help="method names (default %(default)s)")
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="your model, see docs/command.md"
    )
    parser.add_argument("--layers", type=int, default=6, help="layers of the built-in perceptron")
    parser.add_argument("--width", type=int, default=1024, help="width of its layers")
    parser.add_argument("--rows", type=int, default=32, help="rows of its input per rank")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each method")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps before them")
    parser.add_argument("--bucket-mb", type=float, help="DDP's bucket_cap_mb for names without @")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the model (default: cuda if every local rank has a GPU)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_bench(args: argparse.Namespace) -> int:
    """Measure the methods and print the comparison."""
    check_launched("bench")
    screen = Screen(args.json, rank_here())
    methods = tuple(_full_name(one) for one in read_methods(args.methods, args.bucket_mb))
    for name in ("rounds", "steps", "warmup", "layers", "width", "rows"):
        if getattr(args, name) < 1:
            raise CommandError(f"Invalid --{name}: {getattr(args, name)}. Must be 1 or more.")
    workload: TrainingTask = Workload(args.layers, args.width, args.rows)
    if args.model is not None:
        user = UserModel(args.model)
        user.model()
        if not user.can_step:
            raise CommandError(
                f"{args.model} returned only a model. To train it, return (model, loss_function) or "
                "(model, batch)."
            )
        workload = user
    device = pick_device(args.device)
    backend = backend_for(device)
    joined = check_command_lines(args, device, backend)
    counter = InterfaceCounter()
    run = BenchmarkRun(methods, args.rounds, args.warmup, args.steps, workload)
    cells: list[Cell] = []
    with screen.progress("training", len(run.cells())) as advance:
        names = iter([name for _, name in run.cells()][1:])
        advance(methods[0])
        for cell in run_cells(run, backend, device, counter, joined):
            cells.append(cell)
            advance(next(names, "done"))
    rows = rows_of(cells)
    conclusion = conclusion_of(rows, counter.is_loopback)
    _show(screen, rows, counter, conclusion)
    screen.result(
        {
            "environment": environment(),
            "counted": counter.description,
            "methods": [vars(row) for row in rows],
            "conclusion": conclusion,
            "cells": cells,
        }
    )
    return 0


def _full_name(method: Method) -> str:
    """Return the name with the bucket size appended if it is missing."""
    if "@" in method.name or method.bucket_mb is None:
        return method.name
    return f"{method.name}@{method.bucket_mb:f}".rstrip("0").rstrip(".")


def _show(
    screen: Screen, rows: list[Row], counter: InterfaceCounter, conclusion: list[str]
) -> None:
    compared = dense_method(rows[0].method, [row.method for row in rows]) is not None
    screen.table(
        "a step",
        (
            *("method", "ms", "p20", "p80"),
            *(("x fp32",) if compared else ()),
            *("MB, busiest", "MB, all", "cpu ms"),
        ),
        [
            (
                row.method,
                f"{row.median_ms:.1f}",
                f"{row.p20_ms:.1f}",
                f"{row.p80_ms:.1f}",
                *((f"{row.ratio:.3f}",) if compared else ()),
                f"{row.busiest_mb:.3f}",
                f"{row.total_mb:.2f}",
                f"{row.cpu_ms:.1f}",
            )
            for row in rows
        ],
    )
    screen.note(counter.description)
    for line in conclusion:
        screen.note(line)
