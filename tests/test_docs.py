"""The documents are true: programs run, calls and messages exist, links have targets."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_BYTES
from harness import run_ranks

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], key=str)
PACKAGES = ("effadam_hook", "lightning_plugin")

FENCE = re.compile(r"^```python(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$", re.M | re.S)
CALL = re.compile(r"`((?:attach|EfficientAdamState|EfficientAdam(?:\.\w+)?)\([^`]*\))`")
MESSAGE = re.compile(r"\*\*`([^`]+)`\*\*")

in_every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def blocks(document: Path) -> Iterator[tuple[str | None, str]]:
    """The Python blocks of a document; those with a title are whole programs."""
    for match in FENCE.finditer(document.read_text()):
        yield match["title"], match["code"]


def programs() -> list[Any]:
    return [
        pytest.param(title, code, id=f"{document.stem}:{title}")
        for document in DOCUMENTS
        for title, code in blocks(document)
        if title
    ]


@in_every_document
def test_no_line_of_text_begins_with_a_comment(document: Path) -> None:
    """Forges and indexes take such a line for HTML, and show its Markdown as it is written."""
    lines = document.read_text().splitlines()
    assert [line for line in lines if re.match(r" {0,3}<!--.*-->\s*\S", line)] == []


def run_program(rank: int, world_size: int, path: str, port: int) -> None:
    """Set the environment that torchrun sets for a program."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="docs",
    )
    sys.argv = [path]
    os.chdir(Path(path).parent)
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize(("title", "code"), programs())
def test_programs_run_on_two_ranks(
    title: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / title
    path.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(run_program, 2, str(path), port, backend=None)
    assert re.search(r"x (less|fewer)|compressed", capsys.readouterr().out)
    assert code.startswith(f"# {title}\n")


def run_fragments(rank: int, world_size: int) -> int:
    from lightning.pytorch import Trainer

    fragments = [code for title, code in blocks(ROOT / "README.md") if not title]
    for code in fragments:
        names = {
            "args": argparse.Namespace(effadam=True),
            "ddp_model": DistributedDataParallel(nn.Linear(4, 4)),
            "Trainer": Trainer,
        }
        exec(code, names)
    return len(fragments)


def test_the_fragments_of_the_readme_run() -> None:
    assert run_ranks(run_fragments, 1) == [3]


def imported(document: Path) -> Iterator[tuple[str, str]]:
    """List the imports from the packages in a document's Python blocks."""
    for _, code in blocks(document):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                yield from ((str(node.module), alias.name) for alias in node.names)


def find_missing(rank: int, world_size: int, names: list[tuple[str, str]]) -> list[str]:
    return [f"{m}.{name}" for m, name in names if not hasattr(importlib.import_module(m), name)]


def test_blocks_parse_and_import_what_exists() -> None:
    names = sorted({name for document in DOCUMENTS for name in imported(document)})
    assert len(names) > 5
    # On a rank, as those have Lightning imported already.
    assert run_ranks(find_missing, 1, names, backend=None) == [[]]


@in_every_document
def test_calls_have_arguments_that_exist(document: Path) -> None:
    sources = [code for _, code in blocks(document)]
    sources += [match[1] for match in CALL.finditer(document.read_text())]
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                known = accepted(ast.unparse(node.func))
                for keyword in node.keywords:
                    if known and keyword.arg:
                        assert keyword.arg in known, ast.unparse(node)


def accepted(function: str) -> set[str]:
    """The keywords of a function of ours; empty for those of others."""
    state = set(inspect.signature(EfficientAdamState).parameters)
    if function == "attach":
        return state | set(inspect.signature(attach).parameters)
    if function == "EfficientAdamState":
        return state
    if function.partition(".")[0] == "EfficientAdam":
        return set(inspect.signature(EfficientAdam).parameters)
    return set()


@in_every_document
def test_quantizers_in_options_exist(document: Path) -> None:
    names = re.findall(r"(?:worker_|server_)?quantizer=\"([^\"]+)\"", document.read_text())
    assert set(names) <= set(QUANTIZERS)


def test_the_api_page_lists_every_quantizer() -> None:
    rows = []
    for quantizer in QUANTIZERS.values():
        scale = 0 if quantizer.is_raw else 8 * SCALE_BYTES / 256
        levels = len(quantizer.levels) or "any"
        says_zero = "yes" if quantizer.is_raw or quantizer.has_zero else "no"
        bits = quantizer.bits
        rows.append(
            f"| `{quantizer.name}` | {levels} | {bits:g} | {bits + scale:g} | {says_zero} |"
        )
    assert "\n".join(rows) in (ROOT / "docs/api.md").read_text()


def test_the_messages_in_troubleshooting_are_those_of_the_code() -> None:
    known = list(strings())
    messages = MESSAGE.findall((ROOT / "docs/troubleshooting.md").read_text())
    assert len(messages) > 40
    for message in messages:
        pattern = ".*".join(map(re.escape, re.split(r"\s*…\s*", message)))
        assert any(re.search(pattern, text) for text in known), message


def strings() -> Iterator[str]:
    """Every string of the packages, with something in place of what is filled in."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@in_every_document
def test_files_and_make_targets_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M)) <= targets
    for name in re.findall(
        r"\b(?:python|nproc-per-node 2) ((?:examples|benchmarks)/\S+\.py)", text
    ):
        assert (ROOT / name).is_file(), name
    for name in re.findall(
        r"`((?:examples|benchmarks|tests|docs|effadam_hook)/[\w/.]+\.\w+)`", text
    ):
        assert (ROOT / name).is_file(), name
    folders = "|".join(path.name for path in (ROOT / "effadam_hook").iterdir() if path.is_dir())
    for name in re.findall(rf"`((?:{folders})/[\w/.]+\.\w+)`", text):
        assert (ROOT / "effadam_hook" / name).is_file(), name


@in_every_document
def test_tests_that_are_named_exist(document: Path) -> None:
    for module, function in re.findall(r"`(test_\w+)::(test_\w+)`", document.read_text()):
        assert f"def {function}(" in (ROOT / "tests" / f"{module}.py").read_text(), function


@in_every_document
def test_links_lead_to_files(document: Path) -> None:
    """On a forge; on the site, `mkdocs build --strict` looks."""
    for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", document.read_text()):
        assert (document.parent / target).exists(), target
