"""Measure hosts with several ranks that share a link: bytes, step time and processor time.

    sudo python benchmarks/nodes.py --json nodes.json                  # four shapes, under 8 minutes
    sudo python benchmarks/nodes.py --shapes 2x2,4x2 --methods "fp32,lloyd4/{sharded,hierarchical}"

Each shape, hosts x ranks, is a lab of its own, in which all methods run in turn. Steps sleep instead of
computing and have no optimizer, so that the link and the exchange alone determine their time. Three
goals are checked in the last table: megabytes on the busiest link, step time relative to dense, and
processor time relative to the flat topology. The step time with buckets of 1 MB stands beside them:
DDP's own buckets of 25 MB are full only at the end of backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from end_to_end import LabRow, measure, show, table
from lab_run import LabRun
from netlab import LabError, Link, NetLab, RankError

from effadam_hook.cli.environment import environment
from effadam_hook.planner.method import expand_names
from effadam_hook.planner.workloads import Workload

_METHODS = (
    "fp32,powersgd4,lloyd4/{sharded,hierarchical,hierarchical@1},sign/hierarchical,"
    "update:lloyd2/hierarchical"
)
_OURS, _FLAT = "lloyd4/hierarchical", "lloyd4/sharded"


@dataclass(frozen=True)
class Goal:
    """Goals of ``lloyd4/hierarchical`` on one shape.

    Attributes:
        busiest_mb: Most megabytes a step on the busiest link.
        ratio: Largest step time relative to dense.
    """

    busiest_mb: float
    ratio: float


_GOALS = {
    "2x2": Goal(3.45, 0.115),
    "2x4": Goal(3.45, 0.120),
    "4x2": Goal(5.15, 0.150),
    "2x8": Goal(3.45, 0.200),
}


def compare(shape: str, rows: list[LabRow]) -> str:
    """Compare the hierarchical topology with its goals; empty if its method or flat is missing."""
    by_name = {row.method: row for row in rows}
    if not {_OURS, _FLAT} <= by_name.keys() or shape not in _GOALS:
        return ""
    ours, flat, goal = by_name[_OURS], by_name[_FLAT], _GOALS[shape]
    small = by_name.get(f"{_OURS}@1")
    cells = [
        f"{ours.busiest_mb:6.3f} ({_said(ours.busiest_mb <= goal.busiest_mb)}, {goal.busiest_mb:.2f})",
        f"{ours.ratio:6.3f} ({_said(ours.ratio <= goal.ratio)}, {goal.ratio:.3f})",
        "" if small is None else f"{small.ratio:6.3f} ({_said(small.ratio <= goal.ratio)})",
        f"{ours.cpu_ms:7.1f} ({_said(ours.cpu_ms <= flat.cpu_ms)}, {flat.cpu_ms:.1f})",
    ]
    return f"{shape:<8}" + "".join(f"{cell:>26}" for cell in cells)


def _said(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


def main() -> int:
    """Measure every shape, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(_GOALS), help="hosts x ranks, such as 2x8")
    parser.add_argument("--rate", default="200mbit", help="rate of each link")
    parser.add_argument("--methods", default=_METHODS, help="see planner/method.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per cell")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    parser.add_argument("--sleep-ms", type=float, default=60.0, help="see planner/workloads.py")
    parser.add_argument("--json", type=Path, help="write the time of every step to this file")
    args = parser.parse_args()
    methods = tuple(expand_names(args.methods))
    run = LabRun(
        methods, args.rounds, args.warmup, args.steps, Workload(sleep_ms=args.sleep_ms), False
    )
    shapes: dict[str, object] = {}
    compared = []
    try:
        link = Link.parse(args.rate)
        for shape in args.shapes.split(","):
            hosts, ranks = (int(number) for number in shape.split("x"))
            lab = NetLab(hosts, link, ranks)
            with lab:
                cells = measure(run, lab, quiet=True)
            rows = table(cells, link)
            print(show(rows, lab), end="\n\n", flush=True)
            compared.append(compare(shape, rows))
            shapes[shape] = {"cells": cells, "rows": [vars(row) for row in rows]}
            if args.json is not None:  # after every shape, as a later one may fail
                about = {"environment": environment(), "link": link.name}
                args.json.write_text(
                    json.dumps({**about, "run": json.loads(run.to_json()), "shapes": shapes})
                )
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if any(compared):
        heads = ("MB (goal)", "step x fp32 (goal)", "with 1 MB buckets", "cpu ms (flat)")
        print(f"{_OURS:<8}"[:8] + "".join(f"{head:>26}" for head in heads))
        print("\n".join(line for line in compared if line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
