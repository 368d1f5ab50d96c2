"""Figures that documents quote are those of the table that they come from.

A quoted number is followed by a comment, which no reader sees, with its page, section, row and column::

    took 171 ms<!-- benchmarks.md#steps-on-slow-links | lloyd2/sharded | 200 Mbit/s, ms -->

``column #2`` is the second column of that name, and a figure may be rounded. A table is copied from the
output of the command below it, so that a figure is one comment and one command away.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from readme import FIGURE, draw, with_table  # noqa: E402
from readme import MEASURED as MEASURED_TABLES  # noqa: E402

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], key=str)
NUMBER = r"\d*\.?\d+"
QUOTE = re.compile(rf"({NUMBER})[^\d<]*<!-- (?=[\w-]+\.md#)(.+?) -->")
CODE = re.compile(r"```.*?```|^    .*?$|`[^`\n]*`", re.M | re.S)
# Times in milliseconds and losses: what a run of a benchmark can change.
MEASURED = re.compile(r"(?<![\w.])(?:\d+(?= ms\b)|\d?\.\d{3,})(?![\w.]*\d)")
# These only quote; the others contain the tables, or measure what they state beside it.
QUOTING = ("README", "migration-deepspeed", "migration-powersgd", "modes", "quickstart")


def plain(cell: str) -> str:
    return re.sub(r"[`*]|\([^)]*\)$", "", cell.strip()).strip()


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def tables(document: Path) -> dict[str, list[list[list[str]]]]:
    """The cells of a document's tables, by the section they are in."""
    found: dict[str, list[list[list[str]]]] = {}
    section, inside = "", False
    for line in document.read_text().splitlines():
        if line.startswith("#"):
            section = slug(line.lstrip("#"))
        if line.startswith("|"):
            if not inside:
                found.setdefault(section, []).append([])
            found[section][-1].append([plain(cell) for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return found


def look_up(page: str, section: str, row: str, column: str) -> str:
    path = ROOT / "docs" / page if (ROOT / "docs" / page).is_file() else ROOT / page
    name, _, number = column.partition(" #")
    for header, _, *rows in tables(path)[section]:
        columns = [i for i, cell in enumerate(header) if cell == name]
        for cells in rows:
            if cells[0] == row and columns:
                return cells[columns[int(number or 1) - 1]]
    raise AssertionError(f"{page}#{section} has no table with {row!r} and {column!r}")


def is_rounded(quoted: str, cell: str) -> bool:
    number = re.search(NUMBER, cell)
    assert number, f"no number in {cell!r}"
    decimals = len(quoted.partition(".")[2])
    return abs(float(number[0]) - float(quoted)) <= 0.500001 * 10**-decimals


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_quoted_figures_are_those_of_their_table(document: Path) -> None:
    for quoted, source in QUOTE.findall(document.read_text()):
        place, row, column = (part.strip() for part in source.split("|"))
        page, _, section = place.partition("#")
        cell = look_up(page, section, row, column)
        assert is_rounded(quoted, cell), f"{quoted} is {cell} in {source}"


def test_there_are_quotes() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    assert len(QUOTE.findall(text)) == len(re.findall(r"<!-- [\w-]+\.md#", text)) > 20


@pytest.mark.parametrize("name", QUOTING)
def test_every_measured_figure_in_prose_says_where_it_comes_from(name: str) -> None:
    document = ROOT / f"{name}.md" if name == "README" else ROOT / "docs" / f"{name}.md"
    text = QUOTE.sub("", CODE.sub("", document.read_text()))
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert not MEASURED.findall(prose)


@pytest.mark.parametrize(
    ("quoted", "cell", "is_same"),
    [
        ("171", "171", True),
        ("183", "171", False),
        (".33", "**.332**", True),
        (".34", ".332", False),
        ("7.7", "7.73× less", True),
        ("15", "14.92×", True),
        ("1.541", "1.5416", False),
    ],
)
def test_a_figure_may_be_rounded_but_not_differ(quoted: str, cell: str, is_same: bool) -> None:
    assert is_rounded(quoted, cell) == is_same


def test_the_figure_of_the_readme_shows_the_measured_tables() -> None:
    assert FIGURE.read_text() == draw(MEASURED_TABLES.read_text())


def test_the_table_of_the_readme_is_what_the_cost_model_predicts() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_table(text) == text
