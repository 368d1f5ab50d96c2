"""Read a run's log, whatever is in the file: numbers by step, in memory that the numbers alone need.

A log may come from anywhere, so nothing in it is trusted: lines may be broken, of any length or depth,
or hold numbers that no float holds. A line that cannot be read is left out and counted.
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from effadam_hook.errors import CommandError

__all__ = ["Log", "read_log"]

_PREFIX = "effadam/"
_LOSSES = ("loss", "train_loss", "train_loss_step", "training_loss")
_LONGEST_LINE = 1 << 20


@dataclass
class Log:
    """The numbers of a log, one row a step.

    Attributes:
        steps: Ascending.
        columns: By key, a value per step; NaN where the step has none.
        last: Of every key in the file, the value at the largest step that has one.
        skipped: Lines that could not be read, but for an incomplete last one.
        first_skipped: The first of them and why, in words.
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    columns: dict[str, array[float]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    first_skipped: str = ""

    def row(self, index: int) -> dict[str, float]:
        """The values of one step.

        Args:
            index: Which one; negative from the end.

        Returns:
            Finite numbers by key, ``"step"`` among them.
        """
        values = {key: column[index] for key, column in self.columns.items()}
        found = {key: value for key, value in values.items() if not math.isnan(value)}
        return {"step": self.steps[index], **found}


def read_log(path: Path, keys: Sequence[str]) -> Log:
    """Read a log.

    Args:
        path: JSON lines of :class:`effadam_hook.run_log.RunLog`, or the ``metrics.csv`` of Lightning's
            ``CSVLogger`` with the keys of ``CompressionMonitor``.
        keys: Of the columns to keep; there must be one at least.

    Returns:
        The log. Lines of one step are joined; numbers that are not finite are left out.

    Raises:
        CommandError: If it is neither.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise CommandError(
            f"There is no file {str(path)!r} to read: it {what}. Give the file that RunLog wrote, or "
            "Lightning's metrics.csv."
        )
    log = Log(columns={key: array("d") for key in keys})
    newest: dict[str, float] = {}
    # A byte that is no UTF-8 harms the text that it is in, and no number.
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        is_csv = path.suffix.lower() == ".csv"
        for values in _csv_rows(path, file, log) if is_csv else _json_rows(path, file, log):
            _add(log, values, newest)
    log.columns = {
        key: column for key, column in log.columns.items() if not all(map(math.isnan, column))
    }
    if not log.columns:
        broken = f" {log.first_skipped}" if log.skipped else ""
        raise CommandError(
            f"{str(path)!r} has no line with a step and one of {', '.join(sorted(keys))}.{broken} "
            "Write it with effadam_hook.run_log.RunLog, or with Lightning's CSVLogger and "
            "CompressionMonitor."
        )
    _join_steps(log)
    return log


def _add(log: Log, line: Mapping[str, Any], newest: dict[str, float]) -> None:
    """Append the finite numbers of a line; ``newest`` holds the step of each key's last value."""
    values = {
        key.removeprefix(_PREFIX): value
        for key, value in line.items()
        if type(value) is float and math.isfinite(value)
    }
    step = values.get("step")
    if step is None:
        return
    loss = next((values[name] for name in _LOSSES if name in values), None)
    if loss is not None:
        values["loss"] = loss
    log.steps.append(step)
    for key, column in log.columns.items():
        column.append(values.get(key, math.nan))
    for key, value in values.items():
        if step >= newest.get(key, -math.inf):
            newest[key], log.last[key] = step, value


def _join_steps(log: Log) -> None:
    """Sort by step, and make one row of the rows of a step, of which the later ones prevail.

    Lightning writes what was logged at different moments of a step to lines of their own.
    """
    steps = log.steps
    if all(steps[i] < steps[i + 1] for i in range(len(steps) - 1)):
        return
    order = sorted(range(len(steps)), key=steps.__getitem__)
    starts = [i for i, at in enumerate(order) if i == 0 or steps[at] != steps[order[i - 1]]]
    for key, column in log.columns.items():
        joined = array("d", [math.nan]) * len(starts)
        row = -1
        for i, at in enumerate(order):
            row += row + 1 < len(starts) and starts[row + 1] == i
            if not math.isnan(column[at]):
                joined[row] = column[at]
        log.columns[key] = joined
    log.steps = array("d", (steps[order[i]] for i in starts))


def _json_rows(path: Path, file: TextIO, log: Log) -> Iterator[dict[str, Any]]:
    for number, text in _lines(file):
        if not text.strip():
            continue
        try:
            # As floats, integers of any length are numbers or infinite.
            line = json.loads(text, parse_int=float)
        except (ValueError, RecursionError) as error:
            if text.endswith("\n"):  # without: of a run that was killed while it wrote
                why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                _skip(log, f"Line {number} of {str(path)!r} is no JSON: {why}.")
            continue
        if isinstance(line, dict):
            yield line
        else:
            _skip(log, f"Line {number} of {str(path)!r} is no JSON object.")


def _csv_rows(path: Path, file: TextIO, log: Log) -> Iterator[dict[str, float]]:
    rows = csv.reader(text for _, text in _lines(file))
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # such as a field of 128 kB
            _skip(log, f"Line {rows.line_num} of {str(path)!r} is no CSV: {error}.")
            continue
        if header is None:
            header = row
        else:
            cells = zip(header, row, strict=False)
            yield {key: value for key, cell in cells if (value := _number(cell)) is not None}


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Number and text of each line; of a line that is too long, as much as cannot be read."""
    number = 0
    while text := file.readline(_LONGEST_LINE):
        number += 1
        rest = text
        while len(rest) == _LONGEST_LINE and not rest.endswith("\n"):
            rest = file.readline(_LONGEST_LINE)
            if rest.endswith("\n"):
                text += "\n"
        yield number, text


def _skip(log: Log, why: str) -> None:
    log.skipped += 1
    log.first_skipped = log.first_skipped or why


def _number(cell: str) -> float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return None
