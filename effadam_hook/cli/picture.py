"""Figure of the columns of one or several logs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from effadam_hook.cli.logfile import Log
from effadam_hook.cli.ui import printable
from effadam_hook.errors import CommandError

__all__ = ["Panel", "axis_limits", "draw"]

_MAX_POINTS = 20_000
_LARGEST = 1e100  # matplotlib's arithmetic overflows above
_MIN_SPAN = 0.1  # of the largest value: rounding of a constant is no slope


@dataclass(frozen=True)
class Panel:
    """One column of the logs.

    Attributes:
        key: Key of the column.
        title: Title, with the unit.
        factor: Factor from the values of the log to that unit.
        from_zero: Whether the axis starts at zero, for values that are compared as ratios.
    """

    key: str
    title: str
    factor: float = 1.0
    from_zero: bool = False


def draw(logs: Mapping[str, Log], panels: Sequence[Panel], path: Path) -> None:
    """Draw one panel per column, with a line for each log, and write the figure.

    Args:
        logs: The logs, by the names in the legend.
        panels: The columns. A log may lack some of them.
        path: File of the figure. Its suffix determines the format; PNG without a suffix.

    Raises:
        CommandError: If the format is unknown, or the figure cannot be drawn or written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    try:
        known = figure.canvas.get_supported_filetypes()
        kind = path.suffix[1:].lower() or "png"
        if kind not in known:
            raise CommandError(
                f"Invalid --png: {str(path)!r}. Its suffix must be one of {', '.join(sorted(known))}."
            )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, logs)
        picture = BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure.tight_layout()
                if len(logs) > 1:
                    _add_legend(figure, axes.flat[0], logs)
                figure.savefig(picture, format=kind, dpi=110, bbox_inches="tight")
        except (ArithmeticError, RuntimeError, ValueError) as error:
            raise CommandError(
                f"The picture cannot be drawn: {error}. Use --no-png for the table alone."
            ) from error
    finally:
        plt.close(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise CommandError(
            f"The picture {str(path)!r} cannot be written: {error.strerror}. Name another file "
            "with --png."
        ) from error


def _draw_panel(axis: Any, panel: Panel, logs: Mapping[str, Log]) -> None:
    values: list[float] = []
    for log in logs.values():
        points = [
            (_drawable(step), _drawable(value * panel.factor))
            for step, value in zip(log.steps, log.columns.get(panel.key, ()), strict=False)
            if value == value  # not NaN
        ]
        shown = points[:: -(-len(points) // _MAX_POINTS) or 1]
        # A log without this column takes its colour all the same; a single point needs a mark.
        marker = "o" if len(shown) == 1 else None
        axis.plot([x for x, _ in shown], [y for _, y in shown], linewidth=1, marker=marker)
        values += (y for _, y in shown)
    axis.set(title=panel.title, xlabel="step")
    axis.set_ylim(*axis_limits(values, panel.from_zero))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)


def axis_limits(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """Return the ends of an axis on which a constant with some noise is a flat line.

    Args:
        values: The values on the axis, at least one.
        from_zero: Whether the axis starts at zero, unless a value is negative.
    """
    low, high = min(values), max(values)
    least = _MIN_SPAN * max(abs(low), abs(high)) or 1.0
    if from_zero and low >= 0:
        return 0.0, 1.08 * high or least
    wider = max(least - (high - low), 0.0) / 2
    margin = 0.05 * max(least, high - low)
    return low - wider - margin, high + wider + margin


def _add_legend(figure: Any, axis: Any, logs: Mapping[str, Log]) -> None:
    """Name the lines below the panels; a dollar starts no formula, an underscore hides no line."""
    names = [" " + printable(name).replace("$", r"\$") for name in logs]
    columns = min(4, len(names))
    figure.legend(axis.lines, names, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0))


def _drawable(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)
