"""``effadam report``: show the log of a run as a table and a figure."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from effadam_hook.cli.logfile import read_log
from effadam_hook.cli.picture import draw
from effadam_hook.cli.ui import Screen, require
from effadam_hook.errors import CommandError

__all__ = ["add_report", "run_report"]

_ROWS = 12
_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("ratio", "x fewer bytes", "{:.2f}"),
    ("worker_residual_norm", "worker residual", "{:.4g}"),
    ("server_residual_norm", "server residual", "{:.4g}"),
    ("exchange_s", "exchange s", "{:.4f}"),
)
_LARGEST_IN_FULL = 1e15


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "log", type=Path, help="file of effadam_hook.run_log.RunLog, or Lightning's metrics.csv"
    )
    parser.add_argument("--png", type=Path, help="the figure (default: the name of the log, .png)")
    parser.add_argument("--no-png", action="store_true", help="print the table only")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_report(args: argparse.Namespace) -> int:
    """Read the log, print the table and write the figure."""
    screen = Screen(args.json)
    drawn = not args.no_png
    if drawn and args.json and args.png is None:
        drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        require("matplotlib", "drawing a figure")
    log = read_log(args.log, [key for key, _, _ in _COLUMNS])
    count = len(log.steps)
    shown = [column for column in _COLUMNS if column[0] in log.columns]
    rows = [
        log.row(i) for i in sorted({round(i * (count - 1) / (_ROWS - 1)) for i in range(_ROWS)})
    ]
    screen.table(
        f"{args.log}, {count} lines",
        ("step", *(title for _, title, _ in shown)),
        [
            (_cell(row, "step", "{:.0f}"), *(_cell(row, key, text) for key, _, text in shown))
            for row in rows
        ],
    )
    result: dict[str, Any] = {
        "log": str(args.log),
        "lines": count,
        "skipped_lines": log.skipped,
        "last": log.last,
        "png": None,
    }
    if log.skipped:
        screen.note(f"{log.skipped} lines were skipped. {log.first_skipped}")
    exchanges = sorted(value for value in log.columns.get("exchange_s", ()) if value > 0)
    if exchanges:
        result["median_exchange_s"] = exchanges[len(exchanges) // 2]
        screen.note(f"median exchange {result['median_exchange_s']:.4g} s")
    if drawn:
        png = args.png or args.log.with_suffix(".png")
        if png.exists() and png.samefile(args.log):
            raise CommandError(
                f"Invalid --png: {str(png)!r}. Must be another file than the log, which the figure "
                "would overwrite."
            )
        draw(log, [(key, title) for key, title, _ in shown], png)
        screen.note(f"wrote {png}")
        result["png"] = str(png)
    screen.result(result)
    return 0


def _cell(row: dict[str, float], key: str, text: str) -> str:
    if key not in row:
        return ""
    return text.format(row[key]) if abs(row[key]) < _LARGEST_IN_FULL else f"{row[key]:.4g}"
