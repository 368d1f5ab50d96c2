"""Outcomes of checks, as sections collect and report them."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "FAILED",
    "OUTCOMES_VARIABLE",
    "PASSED",
    "SKIPPED",
    "Checks",
    "Context",
    "Outcome",
    "SkipError",
    "require",
]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

OUTCOMES_VARIABLE = "GPU_CHECK_OUTCOMES"
"""Environment variable with the path of the file to which a section writes its outcomes."""


class SkipError(Exception):
    """A check cannot run here; the message says why."""


@dataclass(frozen=True)
class Context:
    """Describe where a section runs.

    Attributes:
        device: ``cuda``, or ``cpu`` to try the sections themselves.
        seconds: Time that the section has.
        part: Number of this process among those that share the section.
        parts: Number of the processes.
    """

    device: str
    seconds: float
    part: int = 0
    parts: int = 1
    begin_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Return the time that the section still has."""
        return self.begin_s + self.seconds - time.monotonic()


@dataclass(frozen=True)
class Outcome:
    """Outcome of one check.

    Attributes:
        name: Description of what was checked.
        status: ``passed``, ``failed`` or ``skipped``.
        detail: Figures of a passed check, the error of a failed one, the reason of a skipped one. Its
            first line is a summary.
    """

    name: str
    status: str
    detail: str = ""


@dataclass
class Checks:
    """Outcomes of a section, which are written after each check and survive the section.

    Attributes:
        outcomes: In the order of the checks.
        tables: Lines of Markdown tables for the report.
        running: Name of the check that has begun and not ended.
        facts: Plain values by name, of the section "machine".
    """

    outcomes: list[Outcome] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    running: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, check: Callable[[], Any]) -> bool:
        """Run a check, which raises an exception if it fails and returns figures or None.

        Returns:
            Whether it has not failed.
        """
        self.running = name
        self.write()
        try:
            detail = check()
        except SkipError as reason:
            self.add(name, SKIPPED, str(reason))
        except Exception as error:
            summary = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.add(name, FAILED, f"{summary}\n{traceback.format_exc(limit=-6).strip()}")
        else:
            self.add(name, PASSED, "" if detail is None else str(detail))
        return self.outcomes[-1].status != FAILED

    def add(self, name: str, status: str, detail: str) -> None:
        """Add the outcome of a check."""
        self.outcomes.append(Outcome(name, status, detail))
        self.running = ""
        self.write()

    def write(self) -> None:
        """Write all outcomes to the section's file; readers find the old file or the new one."""
        path = os.environ.get(OUTCOMES_VARIABLE)
        if path:
            new = Path(path).with_suffix(".new")
            new.write_text(json.dumps(asdict(self)))
            new.replace(path)


def require(condition: bool, message: str) -> None:
    """Raise an error unless a condition holds; an assertion could be switched off.

    Args:
        condition: The condition.
        message: The value found, and the rule.

    Raises:
        RuntimeError: If it does not hold.
    """
    if not condition:
        raise RuntimeError(message)
