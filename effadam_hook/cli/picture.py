"""Figure of the columns of a log."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from effadam_hook.cli.logfile import Log
from effadam_hook.errors import CommandError

__all__ = ["draw"]

_MAX_POINTS = 20_000
_LARGEST = 1e100  # matplotlib's arithmetic overflows above


def draw(log: Log, panels: Sequence[tuple[str, str]], path: Path) -> None:
    """Draw one panel per column, and write the figure.

    Args:
        log: The log.
        panels: Key and title of each column.
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
        for axis, (key, title) in zip(axes.flat, panels, strict=False):
            points = [
                (_drawable(step), _drawable(value))
                for step, value in zip(log.steps, log.columns[key], strict=True)
                if value == value  # not NaN
            ]
            shown = points[:: -(-len(points) // _MAX_POINTS)]
            axis.plot([x for x, _ in shown], [y for _, y in shown], linewidth=1)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        picture = BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure.tight_layout()
                figure.savefig(picture, format=kind, dpi=110)
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


def _drawable(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)
