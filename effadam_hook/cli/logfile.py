"""Reader for the log of a run: numbers by step, with memory in proportion to the numbers.

A log may come from any source, so its contents are not trusted: lines may be malformed, of any length
or depth, or contain numbers outside the range of a float. A line that cannot be read is skipped and
counted.
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
    """Numbers of a log, one row per step.

    Attributes:
        steps: Steps, ascending.
        columns: One value per step, by key; NaN for steps without a value.
        last: Value at the largest step that has one, for every key in the file.
        skipped: Number of lines that could not be read, without an incomplete last line.
        first_skipped: Description of the first skipped line and the reason.
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    columns: dict[str, array[float]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    first_skipped: str = ""

    def row(self, index: int) -> dict[str, float]:
        """Return the values of one step.

        Args:
            index: Index of the row; negative values count from the end.

        Returns:
            Finite numbers by key, including ``"step"``.
        """
        values = {key: column[index] for key, column in self.columns.items()}
        found = {key: value for key, value in values.items() if not math.isnan(value)}
        return {"step": self.steps[index], **found}


def read_log(path: Path, keys: Sequence[str]) -> Log:
    """Read a log.

    Args:
        path: JSON lines of :class:`effadam_hook.run_log.RunLog`, or the ``metrics.csv`` of Lightning's
            ``CSVLogger`` with the keys of ``CompressionMonitor``.
        keys: Keys of the columns to keep. The log must contain at least one of them.

    Returns:
        The log. Lines of one step are joined; numbers that are not finite are omitted.

    Raises:
        CommandError: If the file is neither.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise CommandError(
            f"There is no file {str(path)!r} to read: it {what}. Give the file that RunLog wrote, or "
            "Lightning's metrics.csv."
        )
    log = Log(columns={key: array("d") for key in keys})
    newest: dict[str, float] = {}
    # Invalid UTF-8 affects only the text around it, not the numbers.
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
    """Append the finite numbers of a line; ``newest`` is the step of the last value of each key."""
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
    """Sort by step, and join the rows of each step; later rows take precedence.

    Lightning writes one line for each time at which a step logs.
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
            # Parsed as floats, integers of any length become numbers or infinite.
            line = json.loads(text, parse_int=float)
        except (ValueError, RecursionError) as error:
            if text.endswith("\n"):  # without a newline, the run was killed while writing
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
    """Yield number and text of each line; a line that is too long is truncated and so unreadable."""
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
