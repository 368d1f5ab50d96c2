"""Reports of the GPU check: files, and the line of the README that follows from the newest one."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import effadam_hook
from gpu_check.outcome import FAILED, PASSED, SKIPPED

__all__ = ["describe_machine", "markdown", "newest", "status_line"]

NEVER = "The CUDA kernels and the NCCL path have never run on a GPU."


def describe_machine(device: str) -> dict[str, Any]:
    """Return the vendor, the GPUs and the versions.

    Args:
        device: ``cuda`` or ``cpu``.

    Returns:
        Plain values by name. ROCm reports its devices as ``cuda``; the vendor is then AMD.
    """
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "effadam_hook": effadam_hook.__version__,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device != "cuda":
        return {"vendor": "none", "device": "CPU (a trial of the sections)", "count": 0, **found}
    hip = torch.version.hip
    properties = torch.cuda.get_device_properties(0)
    architecture = getattr(properties, "gcnArchName", "") if hip else ""
    return {
        "vendor": "AMD" if hip else "NVIDIA",
        "device": torch.cuda.get_device_name(0),
        "architecture": architecture or "sm_{}{}".format(*torch.cuda.get_device_capability(0)),
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "platform": f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}",
        **found,
    }


def _commit() -> str:
    root = Path(__file__).parent.parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def counts(report: dict[str, Any]) -> Counter[str]:
    """Return the number of checks by status."""
    return Counter(
        outcome["status"] for section in report["sections"] for outcome in section["outcomes"]
    )


def markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown.

    Args:
        report: As in the JSON file.
    """
    machine, number = report["machine"], counts(report)
    lines = [
        f"# GPU check: {machine['vendor']}, {machine['device']}",
        "",
        f"{number[PASSED]} checks passed, {number[FAILED]} failed, {number[SKIPPED]} skipped, in "
        f"{report['seconds']:.0f} s. Command: `make gpu-check`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in machine.items()),
    ]
    for section in report["sections"]:
        outcomes = section["outcomes"]
        lines += ["", f"## {section['name']}", "", f"{section['seconds']:.0f} s.", ""]
        long = len(outcomes) > 20  # hundreds of variants of the kernels
        shown = [one for one in outcomes if not long or one["status"] != PASSED]
        if long:
            passed = sum(one["status"] == PASSED for one in outcomes)
            lines.append(f"- passed: {passed} of {len(outcomes)} checks")
        for one in shown:
            detail = f": {one['detail'].splitlines()[-1]}" if one["detail"] else ""
            lines.append(f"- {one['status']}: {one['name']}{detail}")
        if section["tables"]:
            lines += ["", *section["tables"]]
        for one in outcomes:
            if one["status"] == FAILED and "\n" in one["detail"]:
                lines += ["", f"{one['name']}:", "", "```", one["detail"], "```"]
    return "\n".join(lines) + "\n"


def newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest report of a folder, None if there is none.

    Args:
        folder: Folder of JSON files, ``docs/gpu`` in this repository.
    """
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return max(reports, key=lambda one: str(one["machine"]["date"]), default=None)


def status_line(folder: Path) -> str:
    """Return the line of the README about what has run on GPUs.

    Args:
        folder: As for :func:`newest`.
    """
    report = newest(folder)
    if report is None:
        return NEVER
    machine, number = report["machine"], counts(report)
    return (
        f"`make gpu-check` of {machine['date'].partition(' ')[0]} on {machine['count']} "
        f"{machine['vendor']} {machine['device']} ({machine['platform']}, torch {machine['torch']}): "
        f"{number[PASSED]} checks passed, {number[FAILED]} failed, {number[SKIPPED]} skipped."
    )
