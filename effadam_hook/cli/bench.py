"""``effadam bench``: trains by every method on the ranks that there are, and compares."""

from __future__ import annotations

import argparse

from effadam_hook.cli.environment import environment
from effadam_hook.cli.interface import InterfaceCounter
from effadam_hook.cli.methods import read_methods
from effadam_hook.cli.ranks import backend_for, check_launched, pick_device, rank_here
from effadam_hook.cli.rendezvous import check_command_lines
from effadam_hook.cli.rows import Row, dense_method, rows_of
from effadam_hook.cli.stepping import Cell, Plan, run_cells
from effadam_hook.cli.ui import Screen
from effadam_hook.errors import CommandError
from effadam_hook.planner.method import Method
from effadam_hook.planner.workloads import Trained, UserModel, Workload

__all__ = ["add_bench", "run_bench"]

_METHODS = "none,fp32,fp16,{lloyd4,lloyd2}/sharded"


def add_bench(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--methods", default=_METHODS, help="names (default %(default)s)")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="your model, see the docs")
    parser.add_argument("--layers", type=int, default=6, help="of the perceptron without --model")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32, help="of input, on each rank")
    parser.add_argument("--rounds", type=int, default=3, help="each method is measured so often")
    parser.add_argument("--steps", type=int, default=10, help="on the clock, in each round")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--bucket-mb", type=float, help="where the method's name does not say")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_bench(args: argparse.Namespace) -> int:
    """Measure and compare."""
    check_launched("bench")
    screen = Screen(args.json, rank_here())
    methods = tuple(_full_name(one) for one in read_methods(args.methods, args.bucket_mb))
    for name in ("rounds", "steps", "warmup", "layers", "width", "rows"):
        if getattr(args, name) < 1:
            raise CommandError(f"Invalid --{name}: {getattr(args, name)}. Must be 1 or more.")
    workload: Trained = Workload(args.layers, args.width, args.rows)
    if args.model is not None:
        user = UserModel(args.model)
        user.model()
        if not user.can_step:
            raise CommandError(
                f"{args.model} returned a model alone. To train it, return (model, loss_function) or "
                "(model, batch)."
            )
        workload = user
    device = pick_device(args.device)
    backend = backend_for(device)
    meeting = check_command_lines(args, device, backend)
    counter = InterfaceCounter()
    plan = Plan(methods, args.rounds, args.warmup, args.steps, workload)
    cells: list[Cell] = []
    with screen.progress("training", len(plan.cells())) as advance:
        names = iter([name for _, name in plan.cells()][1:])
        advance(methods[0])
        for cell in run_cells(plan, backend, device, counter, meeting):
            cells.append(cell)
            advance(next(names, "done"))
    rows = rows_of(cells)
    _show(screen, rows, counter)
    screen.result(
        {
            "environment": environment(),
            "counted": counter.what,
            "methods": [vars(row) for row in rows],
            "cells": cells,
        }
    )
    return 0


def _full_name(method: Method) -> str:
    """The name with the buckets that it did not say."""
    if "@" in method.name or method.bucket_mb is None:
        return method.name
    return f"{method.name}@{method.bucket_mb:f}".rstrip("0").rstrip(".")


def _show(screen: Screen, rows: list[Row], counter: InterfaceCounter) -> None:
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
    screen.note(counter.what)
    if not compared:
        screen.note("Nothing was compared with dense: add fp32 to --methods.")
