"""Measure time and bytes of a training step with every method, on the links of a lab.

    sudo python benchmarks/end_to_end.py --rate 1gbit
    sudo python benchmarks/end_to_end.py --rate 200mbit --methods "fp32,{lloyd4,lloyd2}/sharded"
    sudo python benchmarks/end_to_end.py --rate 200mbit --hosts 2 --ranks-per-host 8 \
        --methods "fp32,lloyd4/{sharded,hierarchical}"

All methods run in turn in one set of processes, in several rounds. Each round starts with another
method, so that other load on the machine affects all methods. A step time covers all ranks: it is the
time between the ends of two consecutive steps on the last rank. Bytes are read from the links'
counters, one link for each host, whatever its number of ranks. The floor is the time that the bytes
take on the busiest link in its busier direction, a lower bound for any program that sends these bytes
over these links.

The run fails if a method of this project used the reference kernels, or if the compiled kernels were
rebuilt while it ran: see ``check_kernels`` in ``effadam_hook/cli/kernel_check.py``.
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

from lab_run import LabRun
from netlab import LabError, Link, NetLab, RankError, run_in_lab

from effadam_hook.cli.benchmark_run import Cell
from effadam_hook.cli.environment import environment
from effadam_hook.cli.rows import Row, rows_of
from effadam_hook.planner.method import expand_names
from effadam_hook.planner.workloads import Workload

__all__ = ["LabRow", "measure", "show", "table"]

_HERE = Path(__file__).parent
_ALL = (
    "none,fp32,fp16,bf16,powersgd{1,2,4},{lloyd4,lloyd2,ternary,sign}/{sharded,rank0},"
    "update:{lloyd2,ternary}/sharded"
)


@dataclass(frozen=True)
class LabRow(Row):
    """Summary of one method in a lab.

    Attributes:
        floor_ms: Time that the bytes take on the busiest link in its busier direction.
    """

    floor_ms: float


def measure(run: LabRun, lab: NetLab, quiet: bool = False) -> list[Cell]:
    """Execute a benchmark run in a lab.

    Args:
        run: The benchmark run.
        lab: The lab, entered as a context manager.
        quiet: Whether to suppress progress output.

    Returns:
        The cells, in the order in which they ran.

    Raises:
        RankError: If a rank fails, or did not use the intended kernels.
    """
    with tempfile.TemporaryDirectory(prefix="netlab-") as folder:
        out = Path(folder) / "cells.jsonl"
        command = [sys.executable, str(_HERE / "lab_run.py"), run.to_json(), str(out)]
        run_in_lab(lab, command, quiet=quiet)
        return [json.loads(line) for line in out.read_text().splitlines()]


def table(cells: Sequence[Cell], link: Link) -> list[LabRow]:
    """Summarize cells, one row per method.

    Args:
        cells: The cells that :func:`measure` returned.
        link: Link of the lab's hosts.

    Returns:
        The rows, in the order of the methods.
    """
    return [
        LabRow(**vars(row), floor_ms=1e3 * link.seconds(row.busiest_mb * 1e6))
        for row in rows_of(cells)
    ]


def show(rows: Sequence[LabRow], lab: NetLab) -> str:
    """Format the rows as text."""
    lines = [
        f"{lab.shape}, {lab.link.name}",
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
    """Measure, print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--ranks-per-host", type=int, default=1, metavar="G")
    parser.add_argument("--rate", default="1gbit", help="rate of each link, for example 200mbit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay between hosts")
    parser.add_argument(
        "--keep-windows", action="store_true", help="keep TCP's windows over pauses"
    )
    parser.add_argument(
        "--methods", default=_ALL, help="see planner/method.py; {a,b} stands for both"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per cell")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps before them")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32, help="rows of input per rank")
    parser.add_argument("--sleep-ms", type=float, default=-1.0, help="see planner/workloads.py")
    parser.add_argument("--no-optimizer", action="store_true", help="omit optimizer.step()")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    parser.add_argument("--json", type=Path, help="write the time of every step to this file")
    args = parser.parse_args()
    workload = Workload(args.layers, args.width, args.rows, args.sleep_ms)
    methods = tuple(expand_names(args.methods))
    run = LabRun(methods, args.rounds, args.warmup, args.steps, workload, not args.no_optimizer)
    try:
        link = Link.parse(args.rate, args.delay_ms, args.keep_windows)
        lab = NetLab(args.hosts, link, args.ranks_per_host)
        with lab:
            cells = measure(run, lab)
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = table(cells, link)
    print(show(rows, lab))
    if args.json is not None:
        about = {"environment": environment(), "link": link.name, "hosts": lab.hosts}
        about |= {"ranks_per_host": lab.ranks_per_host}
        args.json.write_text(
            json.dumps({**about, "run": json.loads(run.to_json()), "cells": cells})
        )
    if args.csv is not None:
        _append(args.csv, rows, lab)
    return 0


def _append(path: Path, rows: Sequence[LabRow], lab: NetLab) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["hosts", "ranks_per_host", "link", *LabRow.__dataclass_fields__])
        about = (lab.hosts, lab.ranks_per_host, lab.link.name)
        writer.writerows([*about, *vars(row).values()] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
