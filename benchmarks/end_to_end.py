"""Time and bytes of a training step, every method beside every other, on a lab's links.

    sudo python benchmarks/end_to_end.py --rate 1gbit
    sudo python benchmarks/end_to_end.py --rate 200mbit --methods "fp32,{lloyd4,lloyd2}/sharded"

All methods run in one set of processes, in turn, in several rounds, each round starting with another
one: what else the machine does meets all of them. A step's time is that of the whole machine, from the
end of the last rank's step to the end of its next. Bytes are the links' own counters, and the floor is
what the busiest direction of the busiest link takes to carry them: no program that sends these bytes
over these links can be faster.

There is no report if a method of ours ran on the reference kernels, or if the compiled ones were
built anew while it ran: see ``check_kernels`` in ``effadam_hook/cli/stepping.py``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netlab import LabError, Link, NetLab, RankError, run_in_lab
from stepping import Cell, Plan

from effadam_hook.cli.environment import environment
from effadam_hook.cli.rows import Row as Measured
from effadam_hook.cli.rows import rows_of
from effadam_hook.planner.method import expand_names
from effadam_hook.planner.workloads import Workload

__all__ = ["Row", "measure", "table"]

_HERE = Path(__file__).parent
_ALL = (
    "none,fp32,fp16,bf16,powersgd{1,2,4},{lloyd4,lloyd2,ternary,sign}/{sharded,rank0},"
    "update:{lloyd2,ternary}/sharded"
)


@dataclass(frozen=True)
class Row(Measured):
    """What came out for one method.

    Attributes:
        floor_ms: What the busiest link takes for its bytes.
    """

    floor_ms: float


def measure(plan: Plan, lab: NetLab, quiet: bool = False) -> list[Cell]:
    """Run a plan in a lab.

    Args:
        plan: What to run.
        lab: The lab, built.
        quiet: Whether to print no progress.

    Returns:
        The cells, in the order in which they ran.

    Raises:
        RankError: If a rank fails, also for the kernels that it ran on.
    """
    with tempfile.TemporaryDirectory(prefix="netlab-") as folder:
        out = Path(folder) / "cells.jsonl"
        command = [sys.executable, str(_HERE / "stepping.py"), plan.to_json(), str(out)]
        run_in_lab(lab, command, quiet=quiet)
        return [json.loads(line) for line in out.read_text().splitlines()]


def table(cells: Sequence[Cell], link: Link) -> list[Row]:
    """Summarise cells, one row a method.

    Args:
        cells: What :func:`measure` returned.
        link: The lab's link.

    Returns:
        The rows, in the methods' order.
    """
    return [
        Row(**vars(row), floor_ms=1e3 * link.seconds(row.busiest_mb * 1e6))
        for row in rows_of(cells)
    ]


def show(rows: Sequence[Row], link: Link, hosts: int) -> str:
    """The rows as text."""
    lines = [
        f"{hosts} hosts, {link.name}",
        f"{'method':<26}{'step ms':>9}{'p20':>8}{'p80':>8}{'x fp32':>8}"
        f"{'floor ms':>10}{'busiest MB':>12}{'all MB':>9}{'cpu ms':>8}",
    ]
    lines += [
        f"{row.method:<26}{row.median_ms:9.1f}{row.p20_ms:8.1f}{row.p80_ms:8.1f}{row.ratio:8.3f}"
        f"{row.floor_ms:10.1f}{row.busiest_mb:12.3f}{row.total_mb:9.2f}{row.cpu_ms:8.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--rate", default="1gbit", help="of each link, as in 200mbit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way, host to host")
    parser.add_argument("--keep-windows", action="store_true", help="of TCP over pauses")
    parser.add_argument("--methods", default=_ALL, help="see method.py; {a,b} stands for either")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured in each cell")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32, help="of input, on each rank")
    parser.add_argument("--sleep-ms", type=float, default=-1.0, help="see planner/workloads.py")
    parser.add_argument("--no-optimizer", action="store_true", help="leave out optimizer.step()")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    parser.add_argument("--json", type=Path, help="write every step's time to this file")
    args = parser.parse_args()
    workload = Workload(args.layers, args.width, args.rows, args.sleep_ms)
    methods = tuple(expand_names(args.methods))
    plan = Plan(methods, args.rounds, args.warmup, args.steps, workload, not args.no_optimizer)
    try:
        link = Link.parse(args.rate, args.delay_ms, args.keep_windows)
        with NetLab(args.hosts, link) as lab:
            cells = measure(plan, lab)
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = table(cells, link)
    print(show(rows, link, args.hosts))
    if args.json is not None:
        about = {"environment": environment(), "link": link.name, "hosts": args.hosts}
        args.json.write_text(
            json.dumps({**about, "plan": json.loads(plan.to_json()), "cells": cells})
        )
    if args.csv is not None:
        _append(args.csv, rows, link, args.hosts)
    return 0


def _append(path: Path, rows: Sequence[Row], link: Link, hosts: int) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["hosts", "link", *Row.__dataclass_fields__])
        writer.writerows([hosts, link.name, *vars(row).values()] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
