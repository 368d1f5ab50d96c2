"""Output of the command: tables and notes as text, or one JSON object."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from effadam_hook.errors import CommandError

__all__ = ["Screen", "printable", "require"]


def printable(text: str) -> str:
    """Make text safe for a terminal.

    Args:
        text: Any text, such as the name of a file, a key of a log or the message of an exception.

    Returns:
        The text with escapes for control and format characters, including those that start a
        terminal's escape sequences or reverse its direction. Newlines and tabs remain unchanged.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def require(package: str, purpose: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: Name of the package.
        purpose: Purpose of the package, for the message.

    Raises:
        CommandError: If it is missing, with the remedy.
    """
    if importlib.util.find_spec(package) is None:
        raise CommandError(
            f"The package {package!r} is not installed, and {purpose} needs it. "
            f"Run pip install {package}."
        )


class Screen:
    """Output of rank 0; other ranks print nothing.

    Args:
        as_json: Whether to print nothing to standard output except the result as JSON.
        rank: Rank of this process.
    """

    def __init__(self, as_json: bool, rank: int = 0) -> None:
        self._as_json = as_json
        self._main = rank == 0
        self._has_rich = importlib.util.find_spec("rich") is not None

    def note(self, text: str) -> None:
        """Print a line of text."""
        if not self._main or self._as_json:
            return
        if self._has_rich:
            from rich.console import Console
            from rich.text import Text

            Console(soft_wrap=True).print(Text(printable(text)))
        else:
            sys.stdout.write(f"{printable(text)}\n")

    def code(self, text: str) -> None:
        """Print lines of code without formatting."""
        if self._main and not self._as_json:
            sys.stdout.write(f"\n{printable(text)}\n\n")

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        marked: int | None = None,
    ) -> None:
        """Print a table.

        Args:
            title: Title above the table.
            columns: Headers; all columns except the first are aligned to the right.
            rows: Cells of the rows.
            marked: Index of a row to highlight.
        """
        if not self._main or self._as_json:
            return
        if not self._has_rich:
            sys.stdout.write(_plain_table(title, columns, rows))
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # As Text, so that brackets are not parsed as markup and colons not as emoji.
        table = Table(title=Text(printable(title)), title_justify="left", box=SIMPLE_HEAD)
        for index, column in enumerate(columns):
            header = Text(printable(column))
            table.add_column(header, justify="right" if index else "left", no_wrap=True)
        for index, row in enumerate(rows):
            cells = [Text(printable(str(cell))) for cell in row]
            table.add_row(*cells, style="bold green" if index == marked else None)
        console = Console()
        if not console.is_terminal:
            console = Console(width=200)
        console.print(table)

    def result(self, value: dict[str, Any]) -> None:
        """Print the result as JSON; numbers that are not finite become ``null``."""
        if self._main and self._as_json:
            sys.stdout.write(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show a progress bar on standard error.

        Args:
            label: Label of the bar.
            total: Number of parts.

        Yields:
            Function to be called with a description at the start of each part.
        """
        if not self._main or not self._has_rich:
            yield lambda part: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total + 1)

            def advance(part: str) -> None:
                bar.update(task, advance=1, description=printable(f"{label}: {part}"))

            yield advance


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as text, all columns except the first aligned to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([printable(title), *map(str.rstrip, lines), "", ""])


def _strict(value: Any) -> Any:
    """Convert a value to types that JSON supports."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
