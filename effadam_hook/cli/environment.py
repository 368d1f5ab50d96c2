"""Machine and versions that belong to a measurement."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import torch

import effadam_hook
from effadam_hook.kernels import select
from effadam_hook.kernels.cpu import libraries

__all__ = ["environment", "kernel_build"]


def environment() -> dict[str, object]:
    """Describe the machine and the versions, for the record of a measurement.

    Returns:
        Plain values by name.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # not on Windows
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "effadam_hook": effadam_hook.__version__,
        "kernels": select(torch.device("cpu")).name,
        "kernel_build": kernel_build(),
    }


def kernel_build() -> str:
    """Return the digest of the compiled kernels that are installed at this moment.

    Returns:
        The first 12 hexadecimal digits of the library's SHA-256; ``"none"`` if there is no library.
    """
    built = libraries()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in built))
    return digest.hexdigest()[:12] if built else "none"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
