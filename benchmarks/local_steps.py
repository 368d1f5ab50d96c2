"""Compare local steps and other rivals with this project: loss per step, and time to a loss.

    python benchmarks/local_steps.py                      # all runs, a quarter of an hour of one core
    python benchmarks/local_steps.py --only-report --figure docs/figures/local_steps.png

The text example (470 thousand parameters), 4 workers in one process, 608 steps, one seed. A method
with local steps trains every worker alone and synchronizes after H steps: post-local SGD averages the
weights after 64 dense steps (`torch.distributed.algorithms.model_averaging`); DiLoCo passes the mean of
the changes to an outer SGD with Nesterov momentum, as torchft does. Both keep the moments of Adam
local. `fp8` sends e4m3 with a scale for 256 elements in both directions and keeps no error. PowerSGD
has the options of `time_to_quality.py`.

The time of a step comes from the cost model (docs/cost-model.md) for 4 hosts with a core each, without
the time of kernels and of PowerSGD's products. A local step has no exchange, and a synchronization
overlaps with nothing. `--compute-ms` is the time of a step without communication.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quality_runs import RESULTS, Record, Schedule, markdown, read, train, write
from quality_tasks import Prose
from rivals import FP8_ROW, LocalSteps, PowerSGD, fp8_mean
from simulation import Average, Simulation, dense_mean
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from effadam_hook import EfficientAdam
from effadam_hook.planner.cluster import Cluster, Compute, Link
from effadam_hook.planner.method import Method as Name
from effadam_hook.planner.predict import predict
from effadam_hook.planner.traffic import ParameterSize
from effadam_hook.planner.workloads import describe

WORKERS = 4
SCHEDULE = Schedule(608, 50, 32)
_DENSE_STEPS = 64
_LR, _DECAY = 9e-3, 0.01
LINKS = {
    "1 Gbit/s": (1000, 0),
    "200 Mbit/s": (200, 0),
    "50 Mbit/s": (50, 0),
    "10 Mbit/s": (10, 0),
    "200 Mbit/s, 20 ms": (200, 20),
    "200 Mbit/s, 50 ms": (200, 50),
    "50 Mbit/s, 50 ms": (50, 50),
}
"""Rate in Mbit/s and one-way delay in milliseconds."""


@dataclass(frozen=True)
class Rival:
    """A method.

    Attributes:
        name: Name in tables.
        planned: Name in the cost model, of the exchange of one step or of one synchronization.
        build: Makes what :func:`quality_runs.train` steps, from the model and the learning rate.
        period: H; 1 without local steps.
        dense_steps: Number of dense steps at the start.
        length: Factor of the number of steps. Local steps cost little on slow links.
    """

    name: str
    planned: str
    build: Callable[[nn.Module, float], Simulation | LocalSteps]
    period: int = 1
    dense_steps: int = 0
    length: int = 1

    @property
    def schedule(self) -> Schedule:
        """Steps and learning rate."""
        return replace(SCHEDULE, steps=SCHEDULE.steps * self.length)


def _adamw(parameters: list[nn.Parameter], lr: float) -> AdamW:
    return AdamW(parameters, lr, (0.8, 0.999), weight_decay=_DECAY, fused=True)


def _average(
    name: str, planned: str, make: Callable[[nn.Module], Average], bytes_of: Callable[[int], int]
) -> Rival:
    def build(model: nn.Module, lr: float) -> Simulation:
        average = make(model)
        simulation = Simulation(model, lambda p: [_adamw(p, lr)], WORKERS, average=average)
        numel = sum(p.numel() for p in model.parameters())
        sent = average.numel if isinstance(average, PowerSGD) else numel
        simulation.bytes_per_step = bytes_of(sent)
        return simulation

    return Rival(name, planned, build)


def _powersgd(rank: int) -> Rival:
    def make(model: nn.Module) -> PowerSGD:
        return PowerSGD([p.shape for p in model.parameters()], rank)

    return _average(f"PowerSGD {rank}", f"powersgd{rank}", make, lambda numel: 8 * numel)


def _gradient(quantizer: str) -> Rival:
    def build(model: nn.Module, lr: float) -> Simulation:
        return Simulation(model, lambda p: [_adamw(p, lr)], WORKERS, quantizer=quantizer)

    return Rival(quantizer, f"{quantizer}/sharded", build)


def _update(quantizer: str, beta1: float) -> Rival:
    def build(model: nn.Module, lr: float) -> Simulation:
        def optimizers(parameters: list[nn.Parameter]) -> list[Optimizer]:
            settings: dict[str, Any] = {"weight_decay": _DECAY, "second_moment": "local"}
            return [EfficientAdam(parameters, lr, (beta1, 0.999), **settings)]

        return Simulation(model, optimizers, WORKERS, quantizer=quantizer)

    return Rival(f"update {quantizer}", f"update:{quantizer}/sharded", build)


def _post_local(period: int) -> Rival:
    def build(model: nn.Module, lr: float) -> LocalSteps:
        return LocalSteps(model, lambda p: _adamw(p, lr), WORKERS, period, _DENSE_STEPS)

    return Rival(f"post-local SGD, H {period}", "fp32", build, period, _DENSE_STEPS)


def _diloco(period: int, quantizer: str = "", length: int = 1) -> Rival:
    def outer(parameters: list[nn.Parameter]) -> Optimizer:
        return SGD(parameters, lr=0.7, momentum=0.6, nesterov=True)

    def build(model: nn.Module, lr: float) -> LocalSteps:
        return LocalSteps(
            model, lambda p: _adamw(p, lr), WORKERS, period, outer=outer, quantizer=quantizer
        )

    name = f"DiLoCo, H {period}" + (f", {quantizer}" if quantizer else "")
    name += f", {length}× steps" if length > 1 else ""
    planned = f"{quantizer}/sharded" if quantizer else "fp32"
    return Rival(name, planned, build, period, length=length)


RIVALS = (
    _average("dense", "fp32", lambda model: dense_mean, lambda numel: 8 * numel),
    _average(
        "fp8",
        "uniform8/sharded",
        lambda model: fp8_mean,
        lambda numel: 2 * (numel + numel // FP8_ROW * 4),
    ),
    _powersgd(1),
    _powersgd(2),
    _powersgd(4),
    _powersgd(8),
    _gradient("lloyd4"),
    _update("lloyd2", 0.6),
    _update("sign", 0.2),
    _post_local(8),
    _post_local(32),
    _diloco(8),
    _diloco(32),
    _diloco(8, "lloyd2"),
    _diloco(32, "lloyd2"),
    _diloco(8, "lloyd2", 2),
    _diloco(32, "lloyd2", 2),
)


def seconds_until(
    rival: Rival, steps: float, sizes: list[ParameterSize], cluster: Cluster, compute: Compute
) -> float:
    """Predict the seconds of the first steps of a run."""
    method = Name.parse(rival.planned)
    if rival.period == 1:
        return steps * predict(method, sizes, cluster, None, compute).step_s
    dense = predict(Name.parse("fp32"), sizes, cluster, None, compute).step_s
    exchange_s = predict(method, sizes, cluster).exchange_s
    first = min(steps, rival.dense_steps)
    return first * dense + (steps - first) * (compute.total_s + exchange_s / rival.period)


def cluster_of(mbit: float, delay_ms: float) -> Cluster:
    """Return 4 hosts on links of a rate, in Mbit/s, with a one-way delay."""
    return Cluster(WORKERS, Link(mbit * 1e6 / 8, latency_s=delay_ms * 1e-3 + 1e-4), cores=1)


@dataclass(frozen=True)
class Report:
    """Times to a loss.

    Attributes:
        records: By name of the method.
        target: The loss, in nats.
        compute: Durations of a step without communication.
        sizes: The parameters.
    """

    records: dict[str, Record]
    target: float
    compute: Compute
    sizes: list[ParameterSize]

    @property
    def rivals(self) -> list[Rival]:
        """The methods that have been run."""
        return [rival for rival in RIVALS if rival.name in self.records]

    def seconds(self, rival: Rival, mbit: float, delay_ms: float) -> float:
        """Predict the time to the loss; infinite if it was not reached."""
        steps = self.records[rival.name].until(self.target)
        if math.isnan(steps):
            return math.inf
        cluster = cluster_of(mbit, delay_ms)
        return seconds_until(rival, steps, self.sizes, cluster, self.compute)

    def table(self) -> str:
        """Format the loss, the bytes and the seconds to the target on every link."""
        best = {
            link: min(self.seconds(rival, *values) for rival in self.rivals)
            for link, values in LINKS.items()
        }
        rows = []
        for rival in self.rivals:
            record = self.records[rival.name]
            steps = record.until(self.target)
            row = [rival.name, f"{record.losses[-1]:.4f}"]
            row.append("never" if math.isnan(steps) else f"{steps:.0f}")
            row.append(f"{record.bytes_per_step / 1e3:.0f}")
            for link, values in LINKS.items():
                seconds = self.seconds(rival, *values)
                text = "never" if math.isinf(seconds) else f"{seconds:.0f}"
                row.append(f"**{text}**" if seconds == best[link] else text)
            rows.append(row)
        header = ["method", "final loss", "steps", "kB a step"]
        return markdown([*header, *(f"{link}, s" for link in LINKS)], rows)

    def fastest(self) -> str:
        """Format the fastest method by delay and rate of the links."""
        dense = Name.parse("fp32")
        rows: list[list[str]] = []
        for delay_ms in (0.0, 20.0, 50.0):
            last = ""
            for tenth in range(40, -11, -1):
                mbit = 10 ** (tenth / 10)
                name = min(self.rivals, key=lambda each: self.seconds(each, mbit, delay_ms)).name
                exchange_s = predict(dense, self.sizes, cluster_of(mbit, delay_ms)).exchange_s
                ratio = _round(exchange_s / self.compute.total_s)
                if name != last:
                    rows.append([f"{delay_ms:g} ms", _round(mbit), "", name, ratio, ""])
                rows[-1][2], rows[-1][5] = _round(mbit), ratio
                last = name
        cells = [
            [delay, f"{high} to {low}", name, f"{least} to {most}"]
            for delay, high, low, name, least, most in rows
        ]
        header = ["one-way delay", "Mbit/s", "fastest", "dense exchange over computation"]
        return markdown(header, cells)

    def draw(self, path: Path) -> None:
        """Draw loss against steps, and the time to the target against the rate."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
        left.set_prop_cycle(color=mpl.colormaps["tab20"].colors)
        mbits = [10 ** (tenth / 10) for tenth in range(41)]
        for rival in self.rivals:
            record = self.records[rival.name]
            style = "--" if rival.period > 1 else "-"
            (line,) = left.plot(record.steps, record.losses, style, linewidth=1.2, label=rival.name)
            times = [self.seconds(rival, mbit, 0.0) for mbit in mbits]
            if math.isfinite(times[0]):
                right.plot(mbits, times, style, linewidth=1.2, color=line.get_color())
        left.axhline(self.target, color="gray", linewidth=0.8)
        left.set(ylim=(1.5, 2.2), xlabel="steps", ylabel="validation loss, nats")
        right.set(xscale="log", yscale="log", xlabel="rate of each link, Mbit/s")
        right.set_ylabel(f"predicted seconds to a loss of {self.target}")
        figure.legend(loc="outside right upper", fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)


def _round(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument("--file", type=Path, default=RESULTS / "local_steps.jsonl")
    parser.add_argument("--lr", type=float, default=_LR, help="of all methods (%(default)s)")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    parser.add_argument("--target", type=float, default=1.6, help="loss in nats (%(default)s)")
    parser.add_argument("--compute-ms", type=float, default=40.0, help="default %(default)s")
    parser.add_argument("--figure", type=Path, metavar="PATH")
    args = parser.parse_args()
    if args.lr != _LR and args.file == RESULTS / "local_steps.jsonl":
        parser.error("--lr needs a --file of its own")
    torch.set_num_threads(1)
    task = Prose(layers=2, width=128, batch=8)
    for rival in RIVALS:
        chosen = not args.methods or rival.name in args.methods
        if args.only_report or not chosen or rival.name in read(args.file):
            continue
        record, _ = train(
            rival.name,
            f"lr {args.lr:g}, {rival.schedule}",
            task,
            lambda model, rival=rival: rival.build(model, args.lr),
            WORKERS,
            rival.schedule,
            0,
        )
        write(args.file, record)
    sizes = describe(task.build_model())
    step_s = args.compute_ms * 1e-3
    compute = Compute(0.3 * step_s, 0.65 * step_s, 0.05 * step_s)
    report = Report(read(args.file), args.target, compute, sizes)
    print(report.table())
    print(f"\n{report.fastest()}")
    if args.figure:
        report.draw(args.figure)


if __name__ == "__main__":
    main()
