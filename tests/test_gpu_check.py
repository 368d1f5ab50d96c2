"""``make gpu-check`` on a machine without a GPU, and what its reports lead to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check import report  # noqa: E402
from gpu_check.outcome import Checks, SkipError, require  # noqa: E402


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpu_check", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_gpu_it_says_so_and_has_a_code_of_its_own() -> None:
    done = gpu_check(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("There is no GPU: torch ")
    assert "--device cpu" in done.stderr


def test_a_section_that_fails_makes_the_check_fail_and_is_in_both_reports(tmp_path: Path) -> None:
    """The section runs the kernels that the environment forces, which do not exist here."""
    arguments = ("--device", "cpu", "--sections", "nccl", "step", "--minutes", "0.5")
    done = gpu_check(*arguments, "--out", str(tmp_path), EFFADAM_KERNELS="absent")
    nccl, step = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert {one["status"] for one in nccl["outcomes"]} == {"skipped"}
    assert "NCCL needs a GPU" in nccl["outcomes"][0]["detail"]
    assert "failed" in {one["status"] for one in step["outcomes"]}
    text = (tmp_path / "report.md").read_text()
    assert "- skipped: 0 ranks, rank0, gradient: NCCL needs a GPU" in text
    assert "- failed: " in text
    assert done.returncode == 1, done.stderr


def test_a_check_passes_fails_or_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "outcomes.json"
    monkeypatch.setenv("GPU_CHECK_OUTCOMES", str(path))
    checks = Checks()
    checks.run("fine", lambda: "3 of 3")
    checks.run("wrong", lambda: require(False, "found 2. Must be 3"))

    def absent() -> None:
        raise SkipError("needs two GPUs")

    checks.run("absent", absent)
    written = json.loads(path.read_text())["outcomes"]
    assert [one["status"] for one in written] == ["passed", "failed", "skipped"]
    assert written[1]["detail"].endswith("RuntimeError: found 2. Must be 3")
    assert written[2]["detail"] == "needs two GPUs"


def made_report(date: str, vendor: str) -> dict[str, Any]:
    machine = {"date": date, "vendor": vendor, "device": "X", "count": 1, "platform": "P 1"}
    outcomes = [{"name": "a", "status": "passed", "detail": ""}]
    section = {"name": "kernels", "seconds": 1.0, "tables": [], "outcomes": outcomes}
    return {"machine": {**machine, "torch": "2.9"}, "seconds": 1.0, "sections": [section]}


def test_the_status_comes_from_the_newest_report(tmp_path: Path) -> None:
    assert "never run on a GPU" in report.status_line(tmp_path)
    for name, date, vendor in (
        ("a", "2026-02-01 10:00", "AMD"),
        ("b", "2026-01-31 9:00", "NVIDIA"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(made_report(date, vendor)))
    line = report.status_line(tmp_path)
    assert "2026-02-01 on 1 AMD X (P 1, torch 2.9)" in line
    assert "1 checks passed, 0 failed" in line


def test_the_readme_says_what_has_run_where() -> None:
    """Without a report it denies that anything has run on a GPU; otherwise it quotes the newest one."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    folder = ROOT / "docs" / "gpu"
    if report.newest(folder) is not None:
        assert report.status_line(folder) in readme
    else:
        denials = ("neither has run on a GPU", "never run on a GPU", "NCCL and GPUs: never")
        assert any(denial in readme for denial in denials)
