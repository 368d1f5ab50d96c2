"""``effadam env``: show installed versions and the kernels that will run."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch
import torch.distributed as dist

import effadam_hook
from effadam_hook.cli.environment import kernel_build
from effadam_hook.cli.ui import Screen
from effadam_hook.kernels import KERNELS_VARIABLE, choose

__all__ = ["add_env", "run_env"]

_PACKAGES = ("torch", "triton", "lightning", "pytorch-lightning", "rich", "matplotlib")


def add_env(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_env(args: argparse.Namespace) -> int:
    """Print versions, machine and kernels.

    Returns:
        0; 1 if the requested kernels cannot run.
    """
    screen = Screen(args.json)
    report = _report()
    screen.table("versions", ("", "version"), list(report["versions"].items()))
    screen.table("machine", ("", ""), list(report["machine"].items()))
    rows = [
        (device, "yes" if one["present"] else "no", one["kernels"], one["reason"])
        for device, one in report["kernels"].items()
    ]
    screen.table("kernels", ("device", "present", "kernels", "why"), rows)
    for device, one in report["kernels"].items():
        if one["remedy"]:
            screen.note(f"{device}: {one['remedy']}")
    screen.result(report)
    return 1 if any(one["kernels"] == "error" for one in report["kernels"].values()) else 0


def _report() -> dict[str, Any]:
    return {
        "versions": {
            "effadam-hook": effadam_hook.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count() or 1,
            "threads of torch": torch.get_num_threads(),
            "CUDA devices": torch.cuda.device_count(),
            "backends": ", ".join(_backends()) or "none",
            "kernel build": kernel_build(),
            KERNELS_VARIABLE: os.environ.get(KERNELS_VARIABLE, "not set"),
        },
        "kernels": {device: _kernels(device) for device in ("cpu", "cuda")},
    }


def _kernels(device: str) -> dict[str, Any]:
    """Return the kernels that run on a device, and those that are requested in any case."""
    present = device == "cpu" or torch.cuda.is_available()
    if not present and not os.environ.get(KERNELS_VARIABLE):
        reason = "torch finds no CUDA device"
        return {"present": False, "kernels": "none", "reason": reason, "remedy": ""}
    try:
        selected = choose(torch.device(device))
    except (ImportError, ValueError) as error:
        return {"present": present, "kernels": "error", "reason": str(error), "remedy": ""}
    return {
        "present": present,
        "kernels": selected.kernels.name,
        "reason": selected.reason,
        "remedy": selected.remedy or "",
    }


def _backends() -> list[str]:
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return [name for name, check in checks.items() if dist.is_available() and check()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
