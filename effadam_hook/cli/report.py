"""``effadam report``: a run's log as a table and a picture."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effadam_hook.cli.ui import Screen, require
from effadam_hook.errors import CommandError

__all__ = ["add_report", "read_log", "run_report"]

Line = dict[str, float]

_PREFIX = "effadam/"
_LOSSES = ("loss", "train_loss", "train_loss_step", "training_loss")
_ROWS = 12
_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("ratio", "x fewer bytes", "{:.2f}"),
    ("worker_residual_norm", "worker residual", "{:.4g}"),
    ("server_residual_norm", "server residual", "{:.4g}"),
    ("exchange_s", "exchange s", "{:.4f}"),
)


def add_report(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "log", type=Path, help="of effadam_hook.log.RunLog, or Lightning's metrics.csv"
    )
    parser.add_argument("--png", type=Path, help="the picture (default: the log's name, .png)")
    parser.add_argument("--no-png", action="store_true", help="only the table")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_report(args: argparse.Namespace) -> int:
    """Read, show, draw."""
    screen = Screen(args.json)
    drawn = not args.no_png
    if drawn and args.json and args.png is None:
        drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        require("matplotlib", "drawing a picture")
    lines = read_log(args.log)
    shown = [column for column in _COLUMNS if any(column[0] in line for line in lines)]
    chosen = sorted({round(i * (len(lines) - 1) / (_ROWS - 1)) for i in range(_ROWS)})
    screen.table(
        f"{args.log}, {len(lines)} lines",
        ("step", *(title for _, title, _ in shown)),
        [
            (f"{lines[i]['step']:.0f}", *(_cell(lines[i], key, text) for key, _, text in shown))
            for i in chosen
        ],
    )
    result: dict[str, Any] = {
        "log": str(args.log),
        "lines": len(lines),
        "last": _last(lines),
        "png": None,
    }
    exchanges = sorted(line["exchange_s"] for line in lines if line.get("exchange_s"))
    if exchanges:
        result["median_exchange_s"] = exchanges[len(exchanges) // 2]
        screen.note(f"median exchange {result['median_exchange_s']:.4f} s")
    if drawn:
        png = args.png or args.log.with_suffix(".png")
        _draw(lines, [(key, title) for key, title, _ in shown], png)
        screen.note(f"wrote {png}")
        result["png"] = str(png)
    screen.result(result)
    return 0


def _cell(line: Line, key: str, text: str) -> str:
    return text.format(line[key]) if key in line else ""


def _last(lines: Sequence[Line]) -> Line:
    last: Line = {}
    for line in lines:
        last.update(line)
    return last


def read_log(path: Path) -> list[Line]:
    """The lines of a log, in the order of their steps.

    Args:
        path: JSON lines of :class:`effadam_hook.log.RunLog`, or the ``metrics.csv`` of Lightning's
            ``CSVLogger`` with the keys of ``CompressionMonitor``.

    Returns:
        Numbers by key, those that are not finite left out; every line has ``"step"``.

    Raises:
        CommandError: If it is neither.
    """
    if not path.is_file():
        raise CommandError(
            f"There is no file {str(path)!r}. Give the file that RunLog wrote, or Lightning's "
            "metrics.csv."
        )
    text = path.read_text(encoding="utf-8")
    raw = _csv_lines(text) if path.suffix == ".csv" else _json_lines(path, text)
    by_step: dict[float, Line] = {}
    for line in raw:
        kept = {
            key.removeprefix(_PREFIX): float(value)
            for key, value in line.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        loss = next((kept[name] for name in _LOSSES if name in kept), None)
        if "step" not in kept:
            continue
        if loss is not None:
            kept["loss"] = loss
        # Lightning writes what was logged at different moments of a step to lines of their own.
        by_step.setdefault(kept["step"], {}).update(kept)
    known = {key for key, _, _ in _COLUMNS}
    if not any(known & line.keys() for line in by_step.values()):
        raise CommandError(
            f"{str(path)!r} has no line with a step and one of {', '.join(sorted(known))}. Write it "
            "with effadam_hook.log.RunLog, or with Lightning's CSVLogger and CompressionMonitor."
        )
    return [by_step[step] for step in sorted(by_step)]


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    lines = []
    rows = text.splitlines()
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except json.JSONDecodeError as error:
            if number == len(rows):  # a run that was killed while it wrote
                break
            raise CommandError(
                f"Line {number} of {str(path)!r} is no JSON: {error}. Every line must be one JSON "
                "object; for Lightning's metrics the name must end in .csv."
            ) from error
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _csv_lines(text: str) -> list[dict[str, Any]]:
    return [
        {key: number for key, cell in row.items() if (number := _number(cell)) is not None}
        for row in csv.DictReader(text.splitlines())
    ]


def _number(cell: str | None) -> float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return None


def _draw(lines: Sequence[Line], panels: Sequence[tuple[str, str]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, title) in zip(axes.flat, panels, strict=False):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot([x for x, _ in points], [y for _, y in points], linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
