"""Measure time and bytes until a given validation loss: the text example on slow links.

    sudo python benchmarks/time_to_quality.py --rate 1gbit --rate 200mbit
    sudo python benchmarks/time_to_quality.py --rate 200mbit --methods fp32 "update lloyd2"

Neither the time per step nor the loss per step is sufficient to compare methods. This benchmark reports
the time and the bytes until a given validation loss. Each method trains the model of
`examples/train_text.py` on every host of a lab at its own learning rate (`METHODS`; docs/benchmarks.md
describes how the rates were found), from the same initial weights and on the same data. The time is
training time without validation. The bytes are read from the links' counters. Both are interpolated
between two validations.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from netlab import LabError, Link, NetLab, RankError, read_wire_bytes, run_in_lab
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from common.launch import Worker, launch
from common.options import read
from common.training import Training
from train_text import Text, build_parser, read_text_options

_ONE_BUCKET_MB = 1 << 16
_DENSE = "--no-effadam --betas .8 .999"
_EFFADAM = "--topology sharded --exchange"
_UPDATE = f"{_EFFADAM} update --second-moment local"
METHODS = {
    "fp32": (9e-3, _DENSE, ""),
    "fp16": (9e-3, _DENSE, "fp16"),
    "powersgd4": (9e-3, _DENSE, "powersgd4"),
    "lloyd4": (9e-3, f"{_EFFADAM} gradient --quantizer lloyd4 --betas .8 .999", ""),
    "update lloyd3": (9e-3, f"{_UPDATE} --quantizer lloyd3 --betas .6 .999", ""),
    "update lloyd2": (9e-3, f"{_UPDATE} --quantizer lloyd2 --betas .6 .999", ""),
    "update sign": (9e-3, f"{_UPDATE} --quantizer sign --betas .2 .999", ""),
}
"""Learning rate, options of `examples/train_text.py`, and the hook of another library, if any."""


@dataclass(frozen=True)
class Curve:
    """Validation losses of one method on one link.

    Attributes:
        method: Name of the method.
        link: Name of the link.
        lr: Learning rate.
        steps: Optimizer steps at each validation.
        losses: Validation losses, in nats.
        seconds: Training time until each validation.
        megabytes: Megabytes sent by all hosts until each validation.
    """

    method: str
    link: str
    lr: float
    steps: list[int]
    losses: list[float]
    seconds: list[float]
    megabytes: list[float]

    def until(self, target: float) -> tuple[float, float, float]:
        """Interpolate steps, seconds and megabytes until a loss; NaN if it was not reached."""
        for index, loss in enumerate(self.losses):
            if loss <= target:
                if index == 0:
                    return self.steps[0], self.seconds[0], self.megabytes[0]
                before = self.losses[index - 1]
                share = (before - target) / (before - loss)
                columns = (self.steps, self.seconds, self.megabytes)
                steps, seconds, megabytes = (
                    column[index - 1] + share * (column[index] - column[index - 1])
                    for column in columns
                )
                return steps, seconds, megabytes
        return math.nan, math.nan, math.nan


class _Measured(Training):
    """Training that reads the links' counters at every validation, with any hook."""

    hook = ""

    def wrap(self) -> DistributedDataParallel:
        cap = _ONE_BUCKET_MB if self.hook.startswith("powersgd") else None
        model = DistributedDataParallel(self.model, bucket_cap_mb=cap)
        if self.hook == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.hook:
            rank = int(self.hook.removeprefix("powersgd"))
            # The default is to average densely for 1000 steps.
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=rank, start_powerSGD_iter=10
            )
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self.sent_mb: list[float] = []
        self._last = self._read_counters()
        return model

    def _validate(self, step: int, train_loss: float, seconds: float) -> None:
        now = self._read_counters()
        before = self.sent_mb[-1] if self.sent_mb else 0.0
        self.sent_mb.append(before + (now - self._last) / 1e6)
        super()._validate(step, train_loss, seconds)
        self._last = self._read_counters()

    def _read_counters(self) -> int:
        dist.barrier()
        total = 0
        if self.worker.is_main:
            total = read_wire_bytes(os.environ["NETLAB_ID"], self.worker.world_size).total
        dist.barrier()
        return total


def _run_rank(
    worker: Worker, names: list[str], lr: float | None, common: list[str], link: str, out: Path
) -> None:
    curves: list[dict[str, Any]] = []
    for name in names:
        own_lr, options, hook = METHODS[name]
        parser = build_parser()
        arguments = parser.parse_args(
            ["--no-plot", f"--lr={lr or own_lr}", *shlex.split(options), *common]
        )
        parsed = read(parser, arguments)
        task = Text(read_text_options(parser, arguments))
        kind = type("Measured", (_Measured,), {"hook": hook})
        training = kind(task, replace(parsed.modes[0], name=name), parsed, worker, settings="")
        points = training.run().points
        curves.append(
            {
                "method": name,
                "link": link,
                "lr": lr or own_lr,
                "steps": [point.step for point in points],
                "losses": [point.loss for point in points],
                "seconds": [point.seconds for point in points],
                "megabytes": training.sent_mb,
            }
        )
        if worker.is_main:
            out.write_text(json.dumps(curves))


def report(curves: list[Curve], target: float) -> str:
    """Format the curves as a table."""
    lines = [
        f"until a validation loss of {target}",
        f"{'link':<10}{'method':<16}{'lr':>8}{'final':>9}{'steps':>8}{'s':>9}{'x fp32':>8}{'MB':>10}",
    ]
    dense = {curve.link: curve.until(target)[1] for curve in curves if curve.method == "fp32"}
    for curve in curves:
        steps, seconds, megabytes = curve.until(target)
        ratio = seconds / dense.get(curve.link, math.nan)
        lines.append(
            f"{curve.link:<10}{curve.method:<16}{curve.lr:>8g}"
            f"{curve.losses[-1]:>9.4f}{steps:>8.0f}{seconds:>9.1f}{ratio:>8.2f}{megabytes:>10.1f}"
        )
    return "\n".join(lines)


def plot(curves: list[Curve], target: float, path: Path) -> None:
    """Plot the loss against time and against bytes, one row per link."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    links = list(dict.fromkeys(curve.link for curve in curves))
    figure, rows = plt.subplots(
        len(links), 2, figsize=(11, 4 * len(links)), squeeze=False, sharey=True
    )
    for row, link in zip(rows, links, strict=True):
        for curve in (curve for curve in curves if curve.link == link):
            row[0].plot(curve.seconds, curve.losses, label=curve.method)
            row[1].plot(curve.megabytes, curve.losses, label=curve.method)
        row[0].set_title(f"{len(curve.steps)} validations, {link} links")
        row[0].set_xlabel("training time, s")
        row[1].set_xlabel("sent by all hosts, MB")
        row[1].set_xscale("log")
        row[0].set_ylabel("validation loss, nats")
        for axes in row:
            axes.axhline(target, color="gray", linewidth=0.8)
            axes.set_ylim(top=2.6)
        row[1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Build a lab for each rate, train, and write the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument(
        "--rate", action="append", help="rate of each link, such as 200mbit; repeatable"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--lr", type=float, help="learning rate of all methods, instead of their own"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--validate-every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", type=float, default=1.6, help="loss in nats, default %(default)s"
    )
    parser.add_argument("--plot", type=Path, default=Path("outputs/time_to_quality.png"))
    parser.add_argument("--csv", type=Path, help="write every validation to this file")
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rates = args.rate or ["1gbit", "200mbit"]
    if args.rank_out is not None:
        common = [
            *(f"--steps={args.steps}", f"--seed={args.seed}"),
            f"--validate-every={args.validate_every}",
        ]
        launch(_run_rank, args.hosts, "cpu", args.methods, args.lr, common, rates[0], args.rank_out)
        return 0
    curves = []
    try:
        for rate in rates:
            with (
                NetLab(args.hosts, Link.parse(rate)) as lab,
                tempfile.TemporaryDirectory(prefix="netlab-") as folder,
            ):
                out = Path(folder) / "curves.json"
                options = ["--hosts", args.hosts, "--rate", rate, "--methods", *args.methods]
                options += ["--steps", args.steps, "--validate-every", args.validate_every]
                options += ["--seed", args.seed, "--rank-out", out]
                options += ["--lr", args.lr] if args.lr is not None else []
                run_in_lab(lab, [sys.executable, __file__, *map(str, options)])
                curves += [Curve(**curve) for curve in json.loads(out.read_text())]
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report(curves, args.target))
    print(f"{args.hosts} hosts, torch {torch.__version__}, {os.cpu_count()} cores in all")
    plot(curves, args.target, args.plot)
    if args.csv is not None:
        _write(args.csv, curves)
    return 0


def _write(path: Path, curves: list[Curve]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["link", "method", "step", "loss", "seconds", "megabytes"])
        for curve in curves:
            columns = zip(curve.steps, curve.losses, curve.seconds, curve.megabytes, strict=True)
            writer.writerows((curve.link, curve.method, *row) for row in columns)


if __name__ == "__main__":
    sys.exit(main())
