"""Measure the cost of quantization in quality: the final validation loss of the text example, by mode.

    python benchmarks/quality.py                # dense, lloyd4, lloyd3, lloyd2, uniform4; 3 seeds
    python benchmarks/quality.py --modes dense lloyd2 --lrs 2e-3 4e-3 8e-3 --seeds 0
    python benchmarks/quality.py --modes dense "late sign=--quantizer sign --warmup-steps 100"
    python benchmarks/quality.py --tuned --figure outputs/modes.png    # the table of docs/algorithm.md
    python benchmarks/quality.py --workers 8 -- --steps 300 --topology sharded

A mode is `dense`, a quantizer, a pair UP/DOWN, or LABEL=OPTIONS with any options of
`examples/train_text.py`. Options after `--` apply to all modes. Every combination of mode, learning
rate and seed is one run. Each run is appended to a CSV file when it ends, and runs that are already in
the file are skipped: an interrupted benchmark continues, and a larger one reuses a smaller one. Delete
the file after a change of the code.

The table shows each mode at its best learning rate (lowest mean loss) among the given rates. Modes have
different best rates, so a comparison at one common rate would measure the choice of that rate.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import platform
import shlex
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from common import checkpoint
from common.launch import Worker, launch
from common.options import Mode, Options, read
from common.training import Run, Training
from train_text import Text, TextOptions, build_parser, read_text_options

COLUMNS = (
    "run",
    "mode",
    "learning_rate",
    "seed",
    "loss",
    "accuracy",
    "uplink_bytes",
    "downlink_bytes",
    "ratio",
    "seconds",
    "options",
)

MODES = ("dense", "lloyd4", "lloyd3", "lloyd2", "uniform4")
LEARNING_RATE = 6e-3
# Exchange, quantizer, learning rate and first beta: the best values for the text example.
TUNED = (
    ("preconditioned", "none", "9e-3", ".8"),
    ("preconditioned", "lloyd4", "6e-3", ".8"),
    ("preconditioned", "lloyd3", "6e-3", ".8"),
    ("preconditioned", "lloyd2", "6e-3", ".6"),
    ("preconditioned", "ternary", "6e-3", ".4"),
    ("preconditioned", "sign", "6e-3", "0"),
    ("update", "none", "12e-3", ".8"),
    ("update", "lloyd4", "9e-3", ".8"),
    ("update", "lloyd3", "9e-3", ".6"),
    ("update", "lloyd2", "9e-3", ".6"),
    ("update", "ternary", "9e-3", ".4"),
    ("update", "sign", "9e-3", ".4"),
)


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark.

    Attributes:
        mode: Label of the mode.
        arguments: Command line of the run.
        options: Parsed options that all examples share.
        text_options: Parsed options of the text example.
    """

    mode: str
    arguments: tuple[str, ...]
    options: Options
    text_options: TextOptions

    @property
    def run(self) -> str:
        """Return a digest of all settings that determine the result."""
        settings = checkpoint.fingerprint(self.options, **asdict(self.text_options))
        return hashlib.sha256(settings.encode()).hexdigest()[:12]


def mode_arguments(mode: str) -> tuple[str, list[str]]:
    """Return the label of a mode and its options of `train_text.py`."""
    label, equals, arguments = mode.partition("=")
    if equals:
        return label, shlex.split(arguments)
    if mode == "dense":
        return mode, ["--no-effadam"]
    parsed = Mode.parse(mode)
    return mode, [f"--worker-quantizer={parsed.uplink}", f"--server-quantizer={parsed.downlink}"]


def tuned_modes() -> list[str]:
    """Return the modes ``dense`` and :data:`TUNED`."""
    return [
        "dense=--no-effadam --lr 9e-3 --betas .8 .999",
        *(
            f"{exchange} {quantizer}=--exchange {exchange} --quantizer {quantizer} --lr {lr}"
            f" --betas {beta} .999"
            f"{' --second-moment local' if exchange == 'update' else ''}"
            for exchange, quantizer, lr, beta in TUNED
        ),
    ]


def make_cells(namespace: argparse.Namespace) -> list[Cell]:
    """Make all cells of the benchmark, seed by seed, so that early results cover all modes."""
    parser = build_parser()
    cells: dict[str, Cell] = {}
    for seed in namespace.seeds:
        for lr in namespace.lrs:
            for mode in namespace.modes:
                label, own = mode_arguments(mode)
                arguments = [
                    *("--no-plot", f"--workers={namespace.workers}", f"--lr={lr}"),
                    *(f"--seed={seed}", *namespace.options, *own),
                ]
                parsed = parser.parse_args(arguments)
                options = read(parser, parsed)
                options = replace(options, validate_every=options.steps)
                text_options = read_text_options(parser, parsed)
                cell = Cell(label, tuple(arguments), options, text_options)
                cells.setdefault(cell.run, cell)
    return list(cells.values())


def measure(worker: Worker, cells: list[Cell], path: Path) -> None:
    """Run the cells in order on every worker; the main worker records the results."""
    for cell in cells:
        mode = replace(cell.options.modes[0], name=f"{cell.mode}, seed {cell.options.seed}")
        task = Text(cell.text_options)
        result = Training(task, mode, cell.options, worker, settings="").run()
        if worker.is_main:
            append(path, cell, result)


def append(path: Path, cell: Cell, result: Run) -> None:
    """Append one result to the CSV file."""
    final = result.final
    values = (
        cell.run,
        cell.mode,
        cell.options.lr,
        cell.options.seed,
        final.loss,
        final.accuracy,
        final.uplink_bytes,
        final.downlink_bytes,
        result.ratio,
        final.seconds,
        shlex.join(cell.arguments),
    )
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(values)


def read_results(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of the CSV file by run; an empty dictionary if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            sys.exit(f"{path} was not written by this benchmark. Choose another file with --csv.")
        return {row["run"]: row for row in rows}


def group(
    cells: list[Cell], results: dict[str, dict[str, str]]
) -> tuple[dict[tuple[str, float], list[dict[str, str]]], dict[str, tuple[float, float]]]:
    """Group rows by mode and learning rate; find the lowest mean loss and its rate for each mode."""
    groups: dict[tuple[str, float], list[dict[str, str]]] = defaultdict(list)
    for cell in cells:
        groups[cell.mode, cell.options.lr].append(results[cell.run])
    best: dict[str, tuple[float, float]] = {}
    for (mode, lr), rows in groups.items():
        best[mode] = min(best.get(mode, (math.inf, lr)), (mean_loss(rows), lr))
    return groups, best


def tables(cells: list[Cell], results: dict[str, dict[str, str]]) -> str:
    """Format markdown tables: each mode at its best learning rate, then all rates if several."""
    groups, best = group(cells, results)
    lines = table_lines(
        {(mode, lr): groups[mode, lr] for mode, (_, lr) in best.items()},
        dense=best.get("dense", (math.nan, 0.0))[0],
    )
    if len(groups) > len(best):
        lines += ["", "All learning rates:", "", *table_lines(groups, dense=math.nan)]
    return "\n".join(lines)


def table_lines(groups: dict[tuple[str, float], list[dict[str, str]]], dense: float) -> list[str]:
    """Format a markdown table with one row for each mode and learning rate."""
    lines = [
        "| mode | learning rate | runs | mean loss | min | max | vs dense | bytes | s/run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (mode, lr), rows in groups.items():
        losses = [float(row["loss"]) for row in rows]
        mean = mean_loss(rows)
        excess = "" if math.isnan(dense) else f"{mean - dense:+.4f}"
        ratio = statistics.mean(float(row["ratio"]) for row in rows)
        seconds = statistics.mean(float(row["seconds"]) for row in rows)
        lines.append(
            f"| {mode} | {lr:g} | {len(rows)} | {mean:.4f} | {min(losses):.4f} |"
            f" {max(losses):.4f} | {excess} | fp32 / {ratio:.2f} | {seconds:.0f} |"
        )
    return lines


def draw(cells: list[Cell], results: dict[str, dict[str, str]], path: Path) -> None:
    """Draw the final loss, mean and range over the seeds, against bits per element and direction.

    Labels of at least two words, such as "update lloyd2", are points of the curve "update". Other
    labels are points of "gradient". The mode "dense" is drawn as a band.
    """
    from matplotlib.figure import Figure

    groups, best = group(cells, results)
    curves: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for mode, (_, lr) in best.items():
        rows = groups[mode, lr]
        losses = [float(row["loss"]) for row in rows]
        if mode == "dense":
            axes.axhspan(min(losses), max(losses), alpha=0.2, color="gray")
            axes.axhline(mean_loss(rows), color="gray", label="dense, all seeds")
            continue
        curve, _, rest = mode.partition(" ")
        bits = 32 / statistics.mean(float(row["ratio"]) for row in rows)
        curves[curve if rest else "gradient"].append(
            (bits, mean_loss(rows), min(losses), max(losses))
        )
    for curve, points in curves.items():
        x, y, low, high = zip(*sorted(points), strict=True)
        spread = [
            [mean - least for mean, least in zip(y, low, strict=True)],
            [most - mean for mean, most in zip(y, high, strict=True)],
        ]
        axes.errorbar(x, y, spread, marker="o", capsize=3, label=curve)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_xlabel("bits per element and direction")
    axes.set_ylabel("final validation loss")
    axes.legend()
    figure.savefig(path, dpi=150)


def mean_loss(rows: list[dict[str, str]]) -> float:
    """Compute the mean final loss; infinite if a run diverged."""
    mean = statistics.mean(float(row["loss"]) for row in rows)
    return mean if math.isfinite(mean) else math.inf


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        help=f"default: {' '.join(MODES)}",
    )
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="all modes, each with its best learning rate and momentum",
    )
    parser.add_argument(
        "--lrs", nargs="+", type=float, help=f"learning rates (default {LEARNING_RATE})"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="%(default)s")
    parser.add_argument("--workers", type=int, default=4, help="default %(default)s")
    parser.add_argument(
        "--csv", type=Path, default=Path("outputs/quality.csv"), help="default %(default)s"
    )
    parser.add_argument(
        "--table", type=Path, metavar="PATH", help="also write the table to this file"
    )
    parser.add_argument("--figure", type=Path, metavar="PATH", help="plot loss against bits")
    parser.add_argument("options", nargs="*", help="options of examples/train_text.py, after --")
    namespace = parser.parse_args()
    if namespace.tuned and (namespace.modes or namespace.lrs):
        parser.error("--tuned includes modes and learning rates: omit --modes and --lrs")
    namespace.modes = namespace.modes or (tuned_modes() if namespace.tuned else list(MODES))
    namespace.lrs = namespace.lrs or [LEARNING_RATE]
    if namespace.figure:
        import matplotlib.figure  # noqa: F401, fail before the runs if it is missing

    cells = make_cells(namespace)
    done = read_results(namespace.csv)
    missing = [cell for cell in cells if cell.run not in done]
    print(f"{len(cells)} runs, {len(missing)} missing; results in {namespace.csv}", flush=True)
    if missing:
        namespace.csv.parent.mkdir(parents=True, exist_ok=True)
        launch(measure, namespace.workers, "auto", missing, namespace.csv)

    text = (
        f"{tables(cells, read_results(namespace.csv))}\n\n"
        f"{namespace.workers} workers, {cells[0].options.steps} steps, torch {torch.__version__},"
        f" {os.cpu_count()} cores, {platform.machine()} {platform.system()}.\n"
        f"Command: python {shlex.join(sys.argv)}\n"
    )
    print(f"\n{text}", end="")
    if namespace.figure:
        namespace.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(cells, read_results(namespace.csv), namespace.figure)
    if namespace.table:
        namespace.table.parent.mkdir(parents=True, exist_ok=True)
        namespace.table.write_text(text)


if __name__ == "__main__":
    main()
