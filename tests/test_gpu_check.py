"""``make gpu-check`` without a GPU: a trial of all sections, and what reports lead to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check.__main__ as command  # noqa: E402
import readme  # noqa: E402
from gpu_check import machine, report  # noqa: E402
from gpu_check.outcome import Checks, Context, Outcome, SkipError, require  # noqa: E402
from gpu_check.processes import run_apart  # noqa: E402
from gpu_check.ranks import Case, compare, judge  # noqa: E402

COMMAND = [sys.executable, "-m", "gpu_check"]
# No path of an installation: a bare checkout is enough.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def outcomes_of(out: Path) -> dict[str, list[dict[str, str]]]:
    sections = json.loads((out / "report.json").read_text())["sections"]
    return {section["name"]: section["outcomes"] for section in sections}


# The sections


def tried(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the names of passed checks; none may fail, or be skipped without naming a call."""
    calls = ("device_count() is 1", 'Trainer(precision="16-mixed")', "lightning` fails")
    for one in outcomes:
        assert one.status != "failed", one.detail
        assert one.status == "passed" or any(call in one.detail for call in calls), one.detail
    return [one.name for one in outcomes if one.status == "passed"]


@pytest.mark.parametrize("section", ["gloo", "nccl", "fsdp", "step", "text", "lightning", "graphs"])
def test_all_that_is_not_cudas_own_runs_on_the_cpu(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a section sets it
    module, _, function = command.SECTIONS[section].run.partition(":")
    run = getattr(import_module(f"gpu_check.{module}"), function)
    assert tried(run(Context("cpu", 100.0)).outcomes)


def test_the_kernels_sections_run_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    arguments = ("--device", "cpu", "--minutes", "2.5", "--sections", "bandwidth", "kernels")
    done = gpu_check(*arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = outcomes_of(tmp_path)
    assert list(found) == ["machine", "kernels", "bandwidth"]
    for section in ("kernels", "bandwidth"):
        assert tried([Outcome(**one) for one in found[section]])


def test_every_section_has_a_claim_that_the_report_makes() -> None:
    assert set(command.SECTIONS) == set(report.CLAIMS)
    assert sum(section.share for section in command.SECTIONS.values()) == pytest.approx(1)


def test_an_error_in_one_run_leaves_the_other_runs_of_the_ranks() -> None:
    checks = Checks()
    cases = [Case(2, topology, "gradient") for topology in ("rank0", "ring", "sharded")]
    compare(checks, Context("cpu", 60.0), "gloo", cases, "here")
    assert [one.status for one in checks.outcomes] == ["passed", "failed", "passed"]
    assert checks.outcomes[1].name == "2 ranks here, ring, gradient"
    assert "Invalid topology" in checks.outcomes[1].detail


def test_other_replicas_lost_gradients_and_other_weights_are_failures() -> None:
    def rank(*weights: float, arrived: float = 0.0) -> dict[str, Any]:
        found = {"weights": torch.tensor(weights), "ratio": 5.0}
        return found | ({"arrived": [torch.full((37, 53), arrived)]} if arrived else {})

    law = [rank(1.0, 2.0)]
    assert "within 0.000%" in judge([rank(1.0, 2.0), rank(1.0, 2.0)], law)
    with pytest.raises(RuntimeError, match="rank 1 has 1 other weights"):
        judge([rank(1.0, 2.0), rank(1.0, 2.000001)], law)
    with pytest.raises(RuntimeError, match="differ from the CPU's by 2"):
        judge([rank(1.0, 2.05)], law)
    lossy = rank(1.0, 2.0, arrived=1.0) | {"state": {"worker": {}, "server": {}}}
    with pytest.raises(RuntimeError, match="results and residuals differ"):
        judge([lossy], law)


# Processes and outcomes


def ended(pid: int) -> bool:
    """Return whether a process ends within some seconds; one that nobody has reaped has ended."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_section_that_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "print('so far'); sys.stdout.flush(); time.sleep(600)"
    )
    begin_s = time.monotonic()
    found = run_apart("x", [sys.executable, "-c", script], ENVIRONMENT, 3.0, tmp_path)
    assert time.monotonic() - begin_s < 30
    (failure,) = found["outcomes"]
    assert failure["detail"] == "The process was killed, as its time was over.\nso far"
    assert ended(int(pid.read_text()))


def test_a_section_that_crashes_keeps_the_outcomes_before(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from gpu_check.outcome import Checks\n"
        "checks = Checks()\n"
        "checks.run('first', lambda: 'fine')\n"
        "checks.run('second', lambda: os.kill(os.getpid(), signal.SIGSEGV))"
    )
    found = run_apart("x", [sys.executable, "-c", script], ENVIRONMENT, 60.0, tmp_path, parts=2)
    assert [one["status"] for one in found["outcomes"]] == ["passed", "failed"] * 2
    assert "was killed by SIGSEGV during 'second'" in found["outcomes"][1]["detail"]


def test_an_interrupted_check_reports_what_has_run(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--minutes", "2", "--sections", "text", "--out", str(tmp_path))
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end_s = time.monotonic() + 90
        while not (tmp_path / "report.md").exists() and time.monotonic() < end_s:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "report.md").read_text()
    assert "**Interrupted; sections that have ended: machine.**" in text


def test_a_section_that_fails_makes_the_check_fail_and_is_first_in_the_report(
    tmp_path: Path,
) -> None:
    """The section runs the kernels that the environment forces, which do not exist here."""
    arguments = (
        "--device",
        "cpu",
        "--sections",
        "graphs",
        "--minutes",
        "1",
        "--out",
        str(tmp_path),
    )
    done = gpu_check(*arguments, EFFADAM_KERNELS="absent")
    assert done.returncode == 1, done.stderr
    text = (tmp_path / "report.md").read_text()
    failed = text.index("## Failed")
    assert (
        failed
        < text.index("- graphs, encode and decode in a CUDA graph: ")
        < text.index("##", failed + 3)
    )
    assert "Invalid EFFADAM_KERNELS: 'absent'" in text
    assert "To repeat: `PYTHONPATH=benchmarks python -m gpu_check --sections graphs`" in text


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
    assert written[1]["detail"].startswith("RuntimeError: found 2. Must be 3\nTraceback")
    assert written[2]["detail"] == "needs two GPUs"


# The machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_and_has_a_code_of_its_own() -> None:
    done = gpu_check()
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("There is no GPU: torch ")
    assert "--device cpu" in done.stderr


@pytest.mark.parametrize(
    ("cuda", "hip", "expected"),
    [
        (None, None, "was built without CUDA and ROCm. Install a build for the GPU."),
        ("12.8", None, "for CUDA 12.8 finds no device (CUDA_VISIBLE_DEVICES=''). Run `nvidia-smi`"),
        (None, "6.4", "for ROCm 6.4 finds no device (CUDA_VISIBLE_DEVICES=''). Run `rocm-smi`"),
    ],
)
def test_a_missing_gpu_has_its_reason(
    cuda: str | None, hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert expected in machine.no_gpu()


def test_rocm_is_reported_as_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", total_memory=192e9)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    found = machine.describe("cuda")
    assert (found["vendor"], found["platform"], found["count"]) == ("AMD", "ROCm 6.4", 8)
    assert found["architecture"].startswith("gfx942")
    assert found["RCCL"] == "not built into torch"
    assert "ROCm reports its devices as cuda" in machine.EXPECTED[found["vendor"]]


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFADAM_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    find = machine.importlib.util.find_spec
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    with pytest.raises(RuntimeError, match=r"Triton is not installed\. Install it: `pip"):
        machine.has_triton()


# What the newest report leads to


def made_report(date: str, vendor: str, count: int = 1) -> dict[str, Any]:
    found = {"date": date, "vendor": vendor, "device": "X", "count": count, "platform": "P 1"}
    outcomes = [{"name": "a", "status": "passed", "detail": ""}]
    section = {"name": "kernels", "seconds": 1.0, "tables": [], "outcomes": outcomes}
    return {"machine": {**found, "torch": "2.9"}, "seconds": 1.0, "sections": [section]}


def test_the_status_comes_from_the_newest_report_of_a_gpu(tmp_path: Path) -> None:
    assert "never yet" in report.status_line(tmp_path)
    trial = made_report("2026-03-01 10:00", "none", count=0)
    (tmp_path / "trial.json").write_text(json.dumps(trial))
    assert "never yet" in report.status_line(tmp_path)
    for name, date, vendor in (
        ("a", "2026-02-01 10:00", "AMD"),
        ("b", "2026-01-31 9:00", "NVIDIA"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(made_report(date, vendor)))
    line = report.status_line(tmp_path)
    assert "2026-02-01 on 1 AMD X (P 1, torch 2.9)" in line
    assert "1 checks passed, 0 failed" in line


def test_the_readme_says_what_has_run_on_gpus() -> None:
    """`python benchmarks/readme.py` writes it there."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert readme.with_status(text) == text
