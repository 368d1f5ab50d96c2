"""A run's log: one JSON object a line, which ``effadam report`` reads.

The keys of a line are ``step``, ``loss`` and those of
:meth:`EfficientAdamState.stats() <effadam_hook.state.EfficientAdamState.stats>`, where ``steps`` counts
backward passes with communication; others may be added. Numbers that are not finite are written as
``null``, which every JSON reader understands.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

__all__ = ["RunLog"]


class RunLog:
    """Writes a log, line by line, so that a run that is killed leaves all its lines.

    Args:
        path: The file; begun anew unless ``append``.
        enabled: False writes nothing: ``enabled=rank == 0`` leaves the log to one rank.
        append: Whether to continue a file that is there, as a resumed run does.

    Example:
        >>> with RunLog("run.jsonl", enabled=dist.get_rank() == 0) as log:
        ...     log.write(step, loss.item(), **state.stats())
    """

    def __init__(self, path: str | Path, *, enabled: bool = True, append: bool = False) -> None:
        self._file = None
        if enabled:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, step: int, loss: float, **values: float | str | None) -> None:
        """Write one line.

        Args:
            step: The optimizer step, from 1.
            loss: The training loss.
            **values: Further values, such as ``**state.stats()``.
        """
        if self._file is None:
            return
        line = {"step": step, "loss": loss, **values}
        self._file.write(json.dumps({key: _plain(value) for key, value in line.items()}) + "\n")
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


def _plain(value: float | str | None) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
