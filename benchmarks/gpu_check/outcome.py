"""Outcomes of checks, as sections collect and report them."""

from __future__ import annotations

import json
import os
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
    """

    device: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Outcome of one check.

    Attributes:
        name: Description of what was checked.
        status: ``passed``, ``failed`` or ``skipped``.
        detail: Figures of a passed check, the difference of a failed one, the reason of a skipped one.
    """

    name: str
    status: str
    detail: str = ""


@dataclass
class Checks:
    """Outcomes of a section.

    Attributes:
        outcomes: In the order of the checks.
        tables: Lines of Markdown tables for the report.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def run(self, name: str, check: Callable[[], Any]) -> None:
        """Run a check, which raises an exception if it fails and returns figures or None."""
        try:
            detail = check()
        except SkipError as reason:
            self.outcomes.append(Outcome(name, SKIPPED, str(reason)))
        except Exception:
            self.outcomes.append(Outcome(name, FAILED, traceback.format_exc(limit=-6).strip()))
        else:
            self.outcomes.append(Outcome(name, PASSED, "" if detail is None else str(detail)))
        self.write()

    def write(self) -> None:
        """Write all outcomes to the section's file, which survives the section."""
        path = os.environ.get(OUTCOMES_VARIABLE)
        if path:
            Path(path).write_text(json.dumps(asdict(self)))


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
