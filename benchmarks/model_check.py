"""Compare the predictions of ``effadam plan`` with measurements in the lab.

    sudo python benchmarks/model_check.py
    sudo python benchmarks/model_check.py --rates 200mbit --methods "fp32,lloyd4/sharded@1"
    sudo python benchmarks/model_check.py --rates 200mbit --hosts 2 --ranks-per-host 2 --sleep-ms 60 \
        --methods "fp32,{lloyd4,lloyd2}/{sharded,hierarchical}@1"

For every rate, in one lab: ``effadam plan``, then the exchange of all gradients without training, then
training steps as ``end_to_end.py`` measures them. The goals are exchange times within 20 % and step
times within 25 %. The wire floor is the time in which the busiest link carries the bytes of a step, as
its counters measure them; "x floor" is the measured exchange relative to it.

All hosts share the machine's cores, so the compute time of a step varies on a busy machine. With
``--sleep-ms`` a step sleeps instead, without an optimizer, and ``effadam plan`` receives this time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from end_to_end import measure, table
from lab_run import LabRun
from netlab import LabError, Link, NetLab, RankError, run_in_lab

from effadam_hook.cli.environment import environment
from effadam_hook.planner.method import expand_names
from effadam_hook.planner.workloads import Workload

_HERE = Path(__file__).parent
_METHODS = "fp32,fp16,{lloyd4,lloyd2}/{sharded,rank0}@1"
_EXCHANGE_GOAL, _STEP_GOAL = 0.20, 0.25


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured times of one method at one rate, in milliseconds."""

    link: str
    method: str
    exchange_predicted: float
    exchange_measured: float
    step_predicted: float
    step_measured: float
    floor: float
    """Time in which the busiest link carries the bytes of a step."""

    @property
    def over_floor(self) -> float:
        """Return the measured exchange time relative to the wire floor."""
        return self.exchange_measured / self.floor

    @property
    def exchange_error(self) -> float:
        """Return the relative error of the predicted exchange time."""
        return self.exchange_predicted / self.exchange_measured - 1

    @property
    def step_error(self) -> float:
        """Return the relative error of the predicted step time."""
        return self.step_predicted / self.step_measured - 1


def check(args: argparse.Namespace, link: Link) -> tuple[list[Comparison], dict[str, object]]:
    """Predict and measure at one rate; return the comparisons and the output of the command."""
    methods = tuple(expand_names(args.methods))
    sleeps = args.sleep_ms >= 0
    workload = Workload(args.layers, args.width, args.rows, args.sleep_ms)
    lab = NetLab(args.hosts, link, args.ranks_per_host)
    with tempfile.TemporaryDirectory(prefix="netlab-") as folder, lab:
        sizes = (args.layers, args.width, args.rows)
        command = ["-m", "effadam_hook", "plan", "--json", "--methods", ",".join(methods)]
        command += ["--mlp", "x".join(map(str, sizes))]
        command += ["--compute-ms", str(args.sleep_ms)] if sleeps else []
        printed = run_in_lab(lab, [sys.executable, *command], quiet=True)[0]
        plan = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
        out = Path(folder) / "exchange.json"
        command = [sys.executable, str(_HERE / "exchange_time.py"), ",".join(methods)]
        command += [",".join(map(str, sizes)), str(args.repeats), str(out)]
        run_in_lab(lab, command, quiet=True)
        exchanges = json.loads(out.read_text())
        steps = LabRun(methods, args.rounds, args.warmup, args.steps, workload, not sleeps)
        rows = {row.method: row for row in table(measure(steps, lab, quiet=True), link)}
    compared = [
        Comparison(
            link.name,
            one["method"],
            1e3 * one["exchange_s"],
            1e3 * exchanges[one["method"]],
            1e3 * one["step_s"],
            rows[one["method"]].median_ms,
            rows[one["method"]].floor_ms,
        )
        for one in plan["predictions"]
    ]
    return compared, plan


def show(compared: list[Comparison]) -> str:
    """Format the comparisons as a table."""
    lines = [
        f"{'link':<14}{'method':<20}{'exchange ms':>14}{'measured':>10}{'error':>8}"
        f"{'floor ms':>10}{'x floor':>9}{'step ms':>12}{'measured':>10}{'error':>8}"
    ]
    lines += [
        f"{one.link:<14}{one.method:<20}{one.exchange_predicted:14.1f}{one.exchange_measured:10.1f}"
        f"{one.exchange_error:+8.0%}{one.floor:10.1f}{one.over_floor:9.2f}{one.step_predicted:12.1f}{one.step_measured:10.1f}"
        f"{one.step_error:+8.0%}"
        for one in compared
    ]
    good = sum(abs(one.exchange_error) <= _EXCHANGE_GOAL for one in compared)
    near = sum(abs(one.step_error) <= _STEP_GOAL for one in compared)
    lines.append(
        f"within the goals: {good} of {len(compared)} exchanges ({_EXCHANGE_GOAL:.0%}), "
        f"{near} of {len(compared)} steps ({_STEP_GOAL:.0%})"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ranks-per-host", type=int, default=1, metavar="G")
    parser.add_argument("--rates", default="200mbit,1gbit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay between hosts")
    parser.add_argument(
        "--keep-windows", action="store_true", help="keep TCP's windows over pauses"
    )
    parser.add_argument("--methods", default=_METHODS)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--sleep-ms", type=float, default=-1.0, help="see planner/workloads.py")
    parser.add_argument("--repeats", type=int, default=6, help="repeats of the exchange")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    compared: list[Comparison] = []
    plans: dict[str, object] = {}
    try:
        for rate in args.rates.split(","):
            link = Link.parse(rate, args.delay_ms, args.keep_windows)
            comparisons, plans[link.name] = check(args, link)
            compared += comparisons
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(show(compared))
    if args.json is not None:
        about = {"environment": environment(), "hosts": args.hosts, "plans": plans}
        about |= {"ranks_per_host": args.ranks_per_host}
        args.json.write_text(json.dumps({**about, "compared": [asdict(one) for one in compared]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
