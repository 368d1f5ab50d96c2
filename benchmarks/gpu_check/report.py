"""Reports of the GPU check: files, and the line of the README that follows from the newest one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.machine import EXPECTED
from gpu_check.outcome import FAILED, PASSED, SKIPPED

__all__ = ["CLAIMS", "NEVER", "counts", "markdown", "newest", "status_line", "summary", "write"]

NEVER = "never yet; `make gpu-check` checks them in 9 minutes."
MANY = 20
REPEAT = "PYTHONPATH=benchmarks python -m gpu_check --sections"

CLAIMS = {
    "machine": "The GPU computes, and Triton's kernels can be loaded.",
    "kernels": "Each kernel gives the reference's values on the CPU, but for codes at ties, and loses "
    "nothing.",
    "gloo": "Ranks that share one GPU over Gloo: equal replicas, nothing lost, and the CPU's weights "
    "but for ties.",
    "step": "A step of DDP with the hook, on one rank, takes no memory, does not wait for the device, "
    "keeps residuals of unused parameters, and runs under autocast and torch.compile.",
    "bandwidth": "Measured, without a limit: the bytes that a kernel must move, by its time on the "
    "device. All calls are queued behind a kernel that spins, and find a cache without their tensors.",
    "nccl": "The same as over Gloo, over NCCL (RCCL on AMD), with a rank for each GPU.",
    "fsdp": "A model that FSDP2 shards, with two replicas of it: equal replicas, and the CPU's weights "
    "but for ties.",
    "text": "A small GPT on Python's sources learns with 4 bits what it learns densely in as many "
    "steps.",
    "lightning": "A Trainer with EfficientAdamStrategy in mixed precision: the loss falls, and the "
    "hook runs.",
    "graphs": "The kernels, and a whole step of DDP with the hook, replay from a CUDA graph.",
}
"""Claim by section, if all of its checks have passed."""


def counts(report: dict[str, Any]) -> Counter[str]:
    """Return the number of checks by status."""
    return Counter(
        outcome["status"] for section in report["sections"] for outcome in section["outcomes"]
    )


def summary(report: dict[str, Any]) -> str:
    """Return the numbers of checks in one sentence."""
    number = counts(report)
    return f"{number[PASSED]} checks passed, {number[FAILED]} failed, {number[SKIPPED]} skipped"


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write ``report.json`` and ``report.md``; return the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    path = folder / "report.md"
    path.write_text(markdown(report))
    return path


def markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown: failures first, then what was skipped, then all sections.

    Args:
        report: As in the JSON file.
    """
    machine, sections = report["machine"], report["sections"]
    lines = [
        f"# GPU check: {machine['vendor']}, {machine['device']}",
        "",
        f"{summary(report)}, in {report['seconds']:.0f} s. Command: `{report['command']}`.",
        EXPECTED.get(machine["vendor"], ""),
    ]
    if report["ended"]:
        lines += ["", f"**{report['ended']}**"]
    for status, title in ((FAILED, "Failed"), (SKIPPED, "Skipped")):
        found = [
            f"- {section['name']}, {_line(one)}"
            for section in sections
            for one in section["outcomes"]
            if one["status"] == status
        ]
        lines += ["", f"## {title}", "", *(found or ["Nothing."])]
        if found and status == FAILED:
            names = [s["name"] for s in sections if any(map(_has_failed, s["outcomes"]))]
            lines += ["", f"Errors in full are below. To repeat: `{REPEAT} {' '.join(names)}`."]
    lines += ["", "## Machine", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in machine.items()]
    for section in sections:
        lines += _section(section)
    return "\n".join(lines) + "\n"


def _section(section: dict[str, Any]) -> list[str]:
    outcomes: Sequence[dict[str, str]] = section["outcomes"]
    passed = [one for one in outcomes if one["status"] == PASSED]
    lines = ["", f"## {section['name']}", "", CLAIMS[section["name"]]]
    lines += ["", f"{len(passed)} of {len(outcomes)} passed, {section['seconds']:.0f} s.", ""]
    if len(passed) <= MANY:
        lines += [f"- {_line(one)}" for one in passed]
    if section["tables"]:
        lines += ["", *section["tables"]]
    for one in filter(_has_failed, outcomes):
        lines += ["", f"Failed: {one['name']}", "", "```", one["detail"], "```"]
    return lines


def _has_failed(outcome: dict[str, str]) -> bool:
    return outcome["status"] == FAILED


def _line(outcome: dict[str, str]) -> str:
    first = outcome["detail"].partition("\n")[0]
    return f"{outcome['name']}: {first}" if first else outcome["name"]


def newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest report of a GPU in a folder, None if there is none.

    Args:
        folder: Folder of JSON files, ``docs/gpu`` in this repository.
    """
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    of_gpus = [one for one in reports if one["machine"]["count"] > 0]  # trials are of the CPU
    return max(of_gpus, key=lambda one: str(one["machine"]["date"]), default=None)


def status_line(folder: Path) -> str:
    """Return what the README says of GPUs: what has run on which, from the newest report.

    Args:
        folder: As for :func:`newest`.
    """
    report = newest(folder)
    if report is None:
        return NEVER
    machine = report["machine"]
    day = machine["date"].partition(" ")[0]
    return (
        f"`make gpu-check` of {day} on {machine['count']} {machine['vendor']} {machine['device']} "
        f"({machine['platform']}, torch {machine['torch']}): {summary(report)}."
    )
