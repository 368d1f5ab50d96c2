"""``effadam env``: what is installed, and which kernels will run."""

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
    """The arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_env(args: argparse.Namespace) -> int:
    """Print it.

    Returns:
        0; 1 if kernels that are wanted cannot run.
    """
    screen = Screen(args.json)
    found = _found()
    screen.table("versions", ("", "version"), list(found["versions"].items()))
    screen.table("machine", ("", ""), list(found["machine"].items()))
    rows = [
        (device, "yes" if one["present"] else "no", one["kernels"], one["reason"])
        for device, one in found["kernels"].items()
    ]
    screen.table("kernels", ("device", "present", "kernels", "why"), rows)
    for device, one in found["kernels"].items():
        if one["remedy"]:
            screen.note(f"{device}: {one['remedy']}")
    screen.result(found)
    return 1 if any(one["kernels"] == "error" for one in found["kernels"].values()) else 0


def _found() -> dict[str, Any]:
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
    """What would run on a device; CUDA's answer needs no GPU."""
    present = device == "cpu" or torch.cuda.is_available()
    try:
        choice = choose(torch.device(device))
    except (ImportError, ValueError) as error:
        return {"present": present, "kernels": "error", "reason": str(error), "remedy": ""}
    return {
        "present": present,
        "kernels": choice.kernels.name,
        "reason": choice.reason,
        "remedy": choice.remedy or "",
    }


def _backends() -> list[str]:
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return [name for name, is_there in checks.items() if dist.is_available() and is_there()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
