"""Processes of sections: one that hangs, crashes or breaks the device leaves the others alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check.outcome import FAILED, OUTCOMES_VARIABLE, Checks, Outcome

__all__ = ["run_apart"]

AFTER_KILL_S = 10.0
OUTPUT_CHARS = 4000


class _Part:
    """A process of a section, with what it has said and found."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self._said = folder / "output"
        self._found = folder / "outcomes.json"
        folder.mkdir()
        self._found.write_text(json.dumps(asdict(Checks())))
        with self._said.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env={**environment, OUTCOMES_VARIABLE: str(self._found)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its ranks end with it
            )

    def wait(self, end_s: float) -> str:
        """Wait until the process has ended; return what was wrong, if anything was."""
        try:
            code = self.process.wait(max(0.0, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return "was killed, as its time was over"
        self.end()  # ranks that are left over
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with code {code}" if code else ""

    def end(self) -> None:
        """Kill the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process that waits for a driver may not end at all.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(AFTER_KILL_S)

    def read(self, name: str, wrong: str) -> dict[str, Any]:
        """Return outcomes, tables, facts and output; what was wrong is a failure."""
        checks: dict[str, Any] = json.loads(self._found.read_text())
        said = self._said.read_text(errors="replace")[-OUTPUT_CHARS:]
        if wrong:
            during = f" during {checks['running']!r}" if checks["running"] else ""
            detail = f"The process {wrong}{during}.\n{said}".strip()
            checks["outcomes"].append(asdict(Outcome(f"section {name}", FAILED, detail)))
        return {**checks, "output": said}


def run_apart(
    name: str,
    command: list[str],
    environment: Mapping[str, str],
    limit_s: float,
    folder: Path,
    parts: int = 1,
) -> dict[str, Any]:
    """Run a section in processes of its own, which are killed when their time is over.

    Args:
        name: Name of the section.
        command: Command line, to which ``--parts`` and ``--part`` are added.
        environment: Environment variables of the processes.
        limit_s: Seconds until they are killed.
        folder: An existing folder for their files.
        parts: Number of processes that share the section.

    Returns:
        ``name``, ``seconds``, and as in :class:`gpu_check.outcome.Checks`, of all parts; ``output``,
        the last characters that they have printed.
    """
    begin_s = time.monotonic()
    running: list[_Part] = []
    merged: dict[str, Any] = {"outcomes": [], "tables": [], "facts": {}, "output": ""}
    try:
        for number in range(parts):
            words = ["--parts", str(parts), "--part", str(number)]
            place = folder / f"{name}.{number}"
            running.append(_Part([*command, *words], environment, place))
        for part in running:
            found = part.read(name, part.wait(begin_s + limit_s))
            merged["outcomes"] += found["outcomes"]
            merged["tables"] += found["tables"]
            merged["facts"] |= found["facts"]
            merged["output"] += found["output"]
    finally:
        for part in running:
            part.end()
    return {"name": name, "seconds": time.monotonic() - begin_s, **merged}
