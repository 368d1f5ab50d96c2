"""Report of a comparison: a table, a plot, and files for scripts."""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .options import Options
    from .training import Run, Task


def table(runs: list[Run], task: Task) -> str:
    """Format the final figures of each run as a table for a terminal."""
    header = [
        "mode",
        f"{task.held_out_name} loss",
        "accuracy",
        "MB up",
        "MB down",
        "vs fp32",
        f"{task.unit}/s",
        "seconds",
    ]
    rows = [
        [
            run.mode,
            f"{run.final.loss:.4f}",
            f"{run.final.accuracy:.1%}",
            f"{run.final.uplink_bytes / 1e6:,.1f}",
            f"{run.final.downlink_bytes / 1e6:,.1f}",
            f"{run.ratio:.2f}x less",
            f"{run.units_per_second:,.0f}",
            f"{run.final.seconds:.1f}",
        ]
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)


def plot(path: Path, runs: list[Run], task: Task) -> None:
    """Plot the headline metric against steps and against the bytes of one worker."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for run in runs:
        values = [getattr(point, task.headline) for point in run.points]
        megabytes = [(point.uplink_bytes + point.downlink_bytes) / 1e6 for point in run.points]
        by_step.plot([point.step for point in run.points], values, marker=".", label=run.mode)
        by_bytes.plot(megabytes, values, marker=".", label=run.mode)
    unit = " (nats)" if task.headline == "loss" else ""
    by_step.set(xlabel="steps", ylabel=f"{task.held_out_name} {task.headline}{unit}")
    by_bytes.set(xlabel="MB sent and received by one worker", xscale="log")
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
    by_step.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(path: Path, runs: list[Run], task: Task, options: Options) -> None:
    """Write curves, final figures, settings and environment."""
    content: dict[str, Any] = {
        "task": task.name,
        "settings": asdict(options),
        "environment": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "runs": [
            asdict(run)
            | {
                "final": asdict(run.final),
                "ratio": run.ratio,
                f"{task.unit}_per_second": run.units_per_second,
            }
            for run in runs
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_csv(path: Path, runs: list[Run]) -> None:
    """Write one row per run and evaluation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["mode", *(field.name for field in fields(runs[0].final))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for run in runs:
            writer.writerows({"mode": run.mode} | asdict(point) for point in run.points)
