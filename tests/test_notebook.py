"""The notebook runs as it is, and what is stored in it is what it shows."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "first_look.ipynb"
MAX_BYTES = 200_000


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def stored(cells: list[dict[str, Any]], kind: str) -> list[Any]:
    outputs = [output for cell in cells for output in cell["outputs"]]
    return [output for output in outputs if output["output_type"] == kind]


def test_the_notebook_trains_on_two_processes(tmp_path: Path) -> None:
    # A copy, as the notebook writes beside itself. Like a notebook, the program is no file.
    shutil.copytree(EXAMPLES / "common", tmp_path / "common")
    shutil.copy(EXAMPLES / "first_look.py", tmp_path)
    source = "\n\n".join("".join(cell["source"]) for cell in code_cells())
    paths = [str(tmp_path), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", source.replace(", 150, folder", ", 60, folder")],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {
        row[1]: tuple(map(float, row[2].replace("%", "").split()))
        for row in re.finditer(
            r"^(dense|[24] bits(?:, no feedback)?) +([\d.% ]+)$", done.stdout, re.M
        )
    }
    assert len(rows) == 4
    assert rows["dense"][3] == 1 < 6.5 < rows["4 bits"][3] < 8 < 11 < rows["2 bits"][3]
    assert rows["4 bits"][0] == pytest.approx(rows["dense"][0], rel=0.05)


def test_the_notebook_s_outputs_are_stored_and_of_this_source() -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import first_look
    finally:
        sys.path.remove(str(EXAMPLES))
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not stored(cells, "error")
    assert sum("image/png" in output["data"] for output in stored(cells, "display_data")) == 2
    shown = "".join("".join(output["text"]) for output in stored(cells, "stream"))
    assert inspect.getsource(first_look.train).rstrip() in shown
    assert NOTEBOOK.stat().st_size < MAX_BYTES
