"""Log of a run: one JSON object per line, which ``effadam report`` reads.

The keys of a line are ``step``, ``loss`` and those of :meth:`EfficientAdamState.stats()
<effadam_hook.state.EfficientAdamState.stats>`, where ``steps`` counts backward passes with
communication. Further keys may be added. Numbers that are not finite are written as ``null``, which
every JSON reader accepts. Scalars and arrays of torch and numpy are written as numbers and lists.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["RunLog"]

_DEEPEST = 16


class RunLog:
    """Writer of a log. Every line is flushed, so that a killed run leaves all its lines.

    Args:
        path: File to write; overwritten unless ``append``.
        enabled: Whether to write. With ``enabled=rank == 0`` only one rank writes.
        append: Whether to continue an existing file, for resumed runs.

    Examples:
        >>> with RunLog("run.jsonl", enabled=dist.get_rank() == 0) as log:
        ...     log.write(step, loss.item(), **state.stats())
    """

    def __init__(self, path: str | Path, *, enabled: bool = True, append: bool = False) -> None:
        self._file = None
        if enabled:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            broken = append and _is_broken_off(path)
            self._file = path.open("a" if append else "w", encoding="utf-8")
            if broken:
                self._file.write("\n")

    def write(self, step: int, loss: Any, **values: Any) -> None:
        """Write one line.

        Args:
            step: The optimizer step, from 1.
            loss: The training loss: a number, or a scalar of torch or numpy; None if there is none.
            **values: Further values, such as ``**state.stats()``: None, numbers, strings, scalars and
                arrays of torch or numpy, lists and dictionaries of those. The host waits for tensors
                on a GPU.

        Raises:
            TypeError: If a value has another type, or ``step`` is not a number.
            ValueError: If a value has more than 16 levels.
        """
        if self._file is None:
            return
        line = {
            key: _plain(key, value) for key, value in {"step": step, "loss": loss, **values}.items()
        }
        if not isinstance(line["step"], int | float):
            raise TypeError(f"Invalid step: {step!r}. Must be a finite number.")
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _plain(key: str, value: Any, depth: int = 0) -> Any:
    """Convert a value to the types of JSON; ``key`` is for messages."""
    if depth > _DEEPEST:
        raise ValueError(
            f"Invalid value of {key!r}: nested more than {_DEEPEST} deep. Write less of it."
        )
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value) if abs(int(value)) < 1 << 64 else _finite(value)
    if isinstance(value, numbers.Real):
        return _finite(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(key, item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # torch and numpy, neither of which is imported here
        return _plain(key, value.tolist(), depth + 1)
    raise TypeError(
        f"Invalid value of {key!r}: {type(value).__name__}. Must be None, a number, a string, a "
        "scalar or an array of torch or numpy, or a list or dictionary of those: pass str(...) of "
        "anything else."
    )


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _is_broken_off(path: Path) -> bool:
    """Return whether the last line is incomplete, as after a run that was killed while writing."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"
