"""The machine: its GPUs and versions, what is expected of it, and whether it can compute at all."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import effadam_hook
from effadam_hook.kernels import KERNELS_VARIABLE, choose
from gpu_check.device import device_of
from gpu_check.outcome import Checks, Context, require

__all__ = ["EXPECTED", "describe", "no_gpu", "run"]

EXPECTED = {
    "NVIDIA": "Compute capability 8.0 and newer: everything is expected to work.",
    "AMD": "ROCm reports its devices as cuda, and RCCL as nccl. The test suite compiles the kernels "
    "for gfx942, where everything is expected to work; other architectures are untried.",
    "none": "A trial of the sections on the CPU: it says nothing about a GPU.",
}
"""Expectation in words, by vendor."""


def no_gpu() -> str:
    """Return what is missing, None if torch finds a GPU.

    Returns:
        The reason and the remedy; an empty text if there is a GPU.
    """
    if torch.cuda.is_available():
        return ""
    built = torch.version.cuda or torch.version.hip
    others = [name for name in ("xpu", "mps") if _has(name)]
    if not built:
        why = "was built without CUDA and ROCm. Install a build for the GPU"
    else:
        platform_name = "ROCm" if torch.version.hip else "CUDA"
        hidden = [
            f"{name}={os.environ[name]!r}"
            for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
            if name in os.environ
        ]
        smi = "rocm-smi" if torch.version.hip else "nvidia-smi"
        why = f"for {platform_name} {built} finds no device"
        why += f" ({', '.join(hidden)})" if hidden else ""
        why += f". Run `{smi}`: it shows whether the driver does"
    found = f" A device of type {others[0]!r} is there, which has no kernels." if others else ""
    return (
        f"There is no GPU: torch {torch.__version__} {why}.{found} Nothing was checked. "
        "--device cpu tries the sections themselves."
    )


def _has(name: str) -> bool:
    module = getattr(torch, name, None) or getattr(torch.backends, name, None)
    available = getattr(module, "is_available", None)
    return bool(available and available())


def describe(device: str) -> dict[str, Any]:
    """Return the vendor, the GPUs and the versions.

    Args:
        device: ``cuda`` or ``cpu``.

    Returns:
        Plain values by name. ROCm reports its devices as ``cuda``; the vendor is then AMD.
    """
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _said("git", "describe", "--always", "--dirty") or "unknown",
        "effadam_hook": effadam_hook.__version__,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }
    if device != "cuda":
        return {"vendor": "none", "device": "CPU (a trial of the sections)", "count": 0, **found}
    hip = torch.version.hip
    properties = torch.cuda.get_device_properties(0)
    architecture = getattr(properties, "gcnArchName", "") if hip else ""
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "not built into torch"
    return {
        "vendor": "AMD" if hip else "NVIDIA",
        "device": torch.cuda.get_device_name(0),
        "architecture": architecture or "sm_{}{}".format(*torch.cuda.get_device_capability(0)),
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "platform": f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}",
        "driver, compute mode": _said(
            "nvidia-smi", "--query-gpu=driver_version,compute_mode", "--format=csv,noheader"
        ).partition("\n")[0]
        or "unknown",
        "RCCL" if hip else "NCCL": version,
        **found,
    }


def run(context: Context) -> Checks:
    """Compute something, and find out which kernels will run."""
    checks = Checks()
    works = checks.run("torch computes on the device", lambda: computes(context.device))
    checks.facts = {"computes": works}
    checks.run("versions", lambda: checks.facts.update(describe(context.device)))
    if context.device == "cuda":
        checks.run("Triton's kernels can be loaded", has_triton)
    return checks


def computes(name: str) -> str:
    """Multiply matrices and compare: torch may have no code for this GPU."""
    device = device_of(name)
    x = torch.randn(256, 256)
    found = (x.to(device.device) @ x.to(device.device)).cpu()
    # TF32, where a user has switched it on, has 10 bits.
    far = float((found - x @ x).abs().max())
    require(far < 0.5, f"a product of matrices is wrong by {far:g}")
    mode = (
        _said("nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader")
        if device.is_gpu
        else ""
    )
    require(
        "Exclusive" not in mode,
        f"The compute mode is {mode!r}, in which only one process can use the GPU. Must be Default: "
        "`nvidia-smi -c DEFAULT`.",
    )
    return "one product of matrices"


def has_triton() -> str:
    """Choose the kernels as a bucket on the GPU does."""
    choice = choose(torch.device("cuda", 0))
    remedy = choice.remedy or f"Unset {KERNELS_VARIABLE}."
    require(
        choice.kernels.name == "triton",
        f"{choice.reason}. {remedy} The sections that follow run the reference, which is slower.",
    )
    return choice.reason


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        import triton
    except ImportError as error:
        return f"cannot be imported: {error}"
    return str(triton.__version__)
