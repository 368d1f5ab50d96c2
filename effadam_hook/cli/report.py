"""``effadam report``: show the logs of one or several runs as a table and a figure."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effadam_hook.cli.logfile import Log, read_log
from effadam_hook.cli.picture import Panel, draw
from effadam_hook.cli.ui import Screen, require
from effadam_hook.errors import CommandError

__all__ = ["add_report", "run_report"]

_ROWS = 12
_LARGEST_IN_FULL = 1e15


@dataclass(frozen=True)
class _Column:
    """A key of the log, its title with the unit, its format, and the factor to that unit."""

    key: str
    title: str
    text: str
    factor: float = 1.0

    def cell(self, value: float | None) -> str:
        if value is None:
            return ""
        value *= self.factor
        return self.text.format(value) if abs(value) < _LARGEST_IN_FULL else f"{value:.4g}"


_STEP = _Column("step", "step", "{:.0f}")
_COLUMNS = (
    _Column("loss", "loss", "{:.4f}"),
    _Column("ratio", "x fewer bytes", "{:.2f}"),
    _Column("worker_residual_norm", "worker residual, 2-norm", "{:.4g}"),
    _Column("server_residual_norm", "server residual, 2-norm", "{:.4g}"),
    _Column("exchange_s", "exchange, ms", "{:.1f}", 1e3),
)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "log",
        type=Path,
        nargs="+",
        help="file of effadam_hook.run_log.RunLog, or Lightning's metrics.csv; several are compared",
    )
    parser.add_argument(
        "--png", type=Path, help="the figure (default: the name of the first log, .png)"
    )
    parser.add_argument("--no-png", action="store_true", help="print the table only")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_report(args: argparse.Namespace) -> int:
    """Read the logs, print the table and write the figure."""
    screen = Screen(args.json)
    drawn = not args.no_png
    if drawn and args.json and args.png is None:
        drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        require("matplotlib", "drawing a figure")
    logs = [read_log(path, [column.key for column in _COLUMNS]) for path in args.log]
    shown = [column for column in _COLUMNS if any(column.key in log.columns for log in logs)]
    names = _names(args.log)
    if len(logs) == 1:
        _show_run(screen, args.log[0], logs[0], shown)
    else:
        _show_runs(screen, names, logs, shown)
    runs = [_summary(path, log) for path, log in zip(args.log, logs, strict=True)]
    for log, run in zip(logs, runs, strict=True):
        if log.skipped:
            screen.note(f"{log.skipped} lines were skipped. {log.first_skipped}")
        if len(logs) == 1 and "median_exchange_s" in run:
            screen.note(f"median exchange {1e3 * run['median_exchange_s']:.4g} ms")
    png = None
    if drawn:
        png = args.png or args.log[0].with_suffix(".png")
        if png.exists() and any(png.samefile(path) for path in args.log):
            raise CommandError(
                f"Invalid --png: {str(png)!r}. Must be another file than the log, which the figure "
                "would overwrite."
            )
        panels = [Panel(c.key, c.title, c.factor, from_zero=c.key != "loss") for c in shown]
        draw(dict(zip(names, logs, strict=True)), panels, png)
        screen.note(f"wrote {png}")
    result = runs[0] if len(runs) == 1 else {"runs": runs}
    screen.result({**result, "png": None if png is None else str(png)})
    return 0


def _show_run(screen: Screen, path: Path, log: Log, columns: Sequence[_Column]) -> None:
    """Print rows of one log, from its first to its last."""
    count = len(log.steps)
    indices = sorted({round(i * (count - 1) / (_ROWS - 1)) for i in range(_ROWS)})
    shown = [_STEP, *columns]
    rows = [[column.cell(log.row(i).get(column.key)) for column in shown] for i in indices]
    screen.table(f"{path}, {count} lines", [column.title for column in shown], rows)


def _show_runs(
    screen: Screen, names: Sequence[str], logs: Sequence[Log], columns: Sequence[_Column]
) -> None:
    """Print a row for each log: last values, and the median of the exchange times."""
    rows = []
    for name, log in zip(names, logs, strict=True):
        last = {**log.last, "exchange_s": _median_exchange_s(log)}
        sent = (log.last.get("uplink_bytes"), log.last.get("downlink_bytes"))
        sent_mb = "" if None in sent else f"{sum(filter(None, sent)) / 1e6:,.1f}"
        cells = [column.cell(last.get(column.key)) for column in columns]
        rows.append([name, _STEP.cell(log.steps[-1]), *cells, sent_mb])
    screen.table(
        f"{len(logs)} runs: last values, and the median of the exchange times",
        ["run", "step", *(column.title for column in columns), "sent and received, MB"],
        rows,
    )


def _summary(path: Path, log: Log) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "log": str(path),
        "lines": len(log.steps),
        "skipped_lines": log.skipped,
        "last": log.last,
    }
    median = _median_exchange_s(log)
    if median is not None:
        summary["median_exchange_s"] = median
    return summary


def _median_exchange_s(log: Log) -> float | None:
    """Return the median of the times of steps that exchanged something."""
    times = sorted(value for value in log.columns.get("exchange_s", ()) if value > 0)
    return times[len(times) // 2] if times else None


def _names(paths: Sequence[Path]) -> list[str]:
    """Return names that differ: without folders and suffix if that is enough."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise CommandError(f"Invalid logs: {', '.join(names)}. Must be different files.")
    return names
