"""Does the cost model tell the truth? ``effadam plan`` in the lab, beside what is then measured there.

    sudo python benchmarks/model_check.py
    sudo python benchmarks/model_check.py --rates 200mbit --methods "fp32,lloyd4/sharded@1"

For every rate, in one lab: the plan; the exchange of all gradients by itself; and steps of training, as
``end_to_end.py`` measures them. The goals: exchange times within 20 %, step times within 25 %.

All hosts share the machine's cores, so on a busy machine a step's computing takes now this long and now
that. With ``--sleep-ms`` it sleeps instead, without an optimizer, and the plan is told how long.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from end_to_end import measure, table
from netlab import LabError, Link, NetLab, RankError, run_in_lab
from stepping import Plan

from effadam_hook.cli.environment import environment
from effadam_hook.planner.method import expand_names
from effadam_hook.planner.workloads import Workload

_HERE = Path(__file__).parent
_METHODS = "fp32,fp16,{lloyd4,lloyd2}/{sharded,rank0}@1"
_EXCHANGE_GOAL, _STEP_GOAL = 0.20, 0.25


@dataclass(frozen=True)
class Compared:
    """One method at one rate, in milliseconds."""

    link: str
    method: str
    exchange_predicted: float
    exchange_measured: float
    step_predicted: float
    step_measured: float

    @property
    def exchange_off(self) -> float:
        """Predicted over measured exchange, less 1."""
        return self.exchange_predicted / self.exchange_measured - 1

    @property
    def step_off(self) -> float:
        """Predicted over measured step, less 1."""
        return self.step_predicted / self.step_measured - 1


def check(args: argparse.Namespace, link: Link) -> tuple[list[Compared], dict[str, object]]:
    """Predict and measure at one rate."""
    methods = tuple(expand_names(args.methods))
    sleeps = args.sleep_ms >= 0
    workload = Workload(args.layers, args.width, args.rows, args.sleep_ms)
    with tempfile.TemporaryDirectory(prefix="netlab-") as folder, NetLab(args.hosts, link) as lab:
        sizes = (args.layers, args.width, args.rows)
        plan = ["-m", "effadam_hook.cli", "plan", "--json", "--methods", ",".join(methods)]
        plan += ["--mlp", "x".join(map(str, sizes))]
        plan += ["--compute-ms", str(args.sleep_ms)] if sleeps else []
        printed = run_in_lab(lab, [sys.executable, *plan], quiet=True)[0]
        planned = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
        out = Path(folder) / "exchange.json"
        command = [sys.executable, str(_HERE / "exchanging.py"), ",".join(methods)]
        command += [",".join(map(str, sizes)), str(args.repeats), str(out)]
        run_in_lab(lab, command, quiet=True)
        exchanges = json.loads(out.read_text())
        steps = Plan(methods, args.rounds, args.warmup, args.steps, workload, not sleeps)
        rows = {row.method: row for row in table(measure(steps, lab, quiet=True), link)}
    compared = [
        Compared(
            link.name,
            one["method"],
            1e3 * one["exchange_s"],
            1e3 * exchanges[one["method"]],
            1e3 * one["step_s"],
            rows[one["method"]].median_ms,
        )
        for one in planned["predictions"]
    ]
    return compared, planned


def show(compared: list[Compared]) -> str:
    """A table for people."""
    lines = [
        f"{'link':<14}{'method':<20}{'exchange ms':>14}{'measured':>10}{'off':>8}"
        f"{'step ms':>12}{'measured':>10}{'off':>8}"
    ]
    lines += [
        f"{one.link:<14}{one.method:<20}{one.exchange_predicted:14.1f}{one.exchange_measured:10.1f}"
        f"{one.exchange_off:+8.0%}{one.step_predicted:12.1f}{one.step_measured:10.1f}"
        f"{one.step_off:+8.0%}"
        for one in compared
    ]
    good = sum(abs(one.exchange_off) <= _EXCHANGE_GOAL for one in compared)
    near = sum(abs(one.step_off) <= _STEP_GOAL for one in compared)
    lines.append(
        f"within the goals: {good} of {len(compared)} exchanges ({_EXCHANGE_GOAL:.0%}), "
        f"{near} of {len(compared)} steps ({_STEP_GOAL:.0%})"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rates", default="200mbit,1gbit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way, host to host")
    parser.add_argument("--keep-windows", action="store_true", help="of TCP over pauses")
    parser.add_argument("--methods", default=_METHODS)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--sleep-ms", type=float, default=-1.0, help="see workloads.py")
    parser.add_argument("--repeats", type=int, default=6, help="of the exchange by itself")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    compared: list[Compared] = []
    plans: dict[str, object] = {}
    try:
        for rate in args.rates.split(","):
            link = Link.parse(rate, args.delay_ms, args.keep_windows)
            found, plans[link.name] = check(args, link)
            compared += found
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(show(compared))
    if args.json is not None:
        about = {"environment": environment(), "hosts": args.hosts, "plans": plans}
        args.json.write_text(json.dumps({**about, "compared": [asdict(one) for one in compared]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
