"""The three kernels, which contain all arithmetic, and the choice of their implementation.

The fastest implementation for a device runs, unless the environment variable ``EFFADAM_KERNELS`` names
one: ``reference``, ``cpu`` or ``triton``. If a faster one is missing, a warning names the remedy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from effadam_hook.errors import warn_caller
from effadam_hook.kernels import reference
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.wire.layout import Wire

__all__ = ["KERNELS_VARIABLE", "Choice", "Kernels", "choose", "describe", "select"]

KERNELS_VARIABLE = "EFFADAM_KERNELS"
"""Environment variable that forces an implementation by its name."""

_NAMES = ("reference", "cpu", "triton")


class Kernels(Protocol):
    """An implementation of the kernels; :mod:`effadam_hook.kernels.reference` defines the results."""

    @property
    def name(self) -> str:
        """Return the name of the implementation, as in ``summary()``."""
        ...

    def encode_(
        self,
        wire: Wire,
        x: Tensor,
        residual: Tensor | None,
        payload: Tensor,
        dtype: torch.dtype,
        *,
        preconditioner: Preconditioner | None = None,
        adam: AdamSource | None = None,
        used: Tensor | None = None,
    ) -> None:
        """Quantize ``x + residual`` on a worker and keep the error in ``residual``."""
        ...

    def reduce_encode_(
        self,
        uplink: Wire,
        downlink: Wire,
        server: int,
        payloads: Tensor,
        residual: Tensor | None,
        dtype: torch.dtype,
        payload: Tensor,
        *,
        preconditioner: Preconditioner | None = None,
        used: Tensor | None = None,
    ) -> None:
        """Average on a server, add ``residual``, quantize again, and keep the error."""
        ...

    def decode(
        self,
        wire: Wire,
        payload: Tensor,
        out: Tensor,
        dtype: torch.dtype,
        *,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        """Dequantize a payload, on all ranks."""
        ...


@dataclass(frozen=True)
class Choice:
    """An implementation, and the reason for which it was chosen.

    Attributes:
        kernels: The implementation.
        reason: Its name and the reason, as text.
        remedy: The missing requirement of a faster implementation, and how to install it; None if there
            is no faster one for the device.
    """

    kernels: Kernels
    reason: str
    remedy: str | None = None


def choose(device: torch.device) -> Choice:
    """Choose the implementation for a device, without warnings.

    Args:
        device: The device of the buckets.

    Returns:
        The implementation and the reason.

    Raises:
        ValueError: If ``EFFADAM_KERNELS`` names an implementation that does not exist.
        ImportError: If it names one that cannot run here.
    """
    forced = os.environ.get(KERNELS_VARIABLE)
    if forced:
        return _force(forced, device)
    if device.type == "cuda":
        return _for_cuda()
    if device.type == "cpu":
        return _for_cpu()
    return Choice(reference, f"reference: there are no fused kernels for {device.type!r} devices")


def select(device: torch.device) -> Kernels:
    """Select the implementation for a device, and warn once if a faster one is missing.

    Args:
        device: The device of the buckets.

    Returns:
        An implementation of the three kernels.

    Raises:
        ValueError: If ``EFFADAM_KERNELS`` names an implementation that does not exist.
        ImportError: If it names one that cannot run here.
    """
    choice = choose(device)
    if choice.remedy is not None and choice.remedy not in _warned:
        _warned.add(choice.remedy)
        warn_caller(
            f"effadam_hook runs its {choice.kernels.name} kernels on {device.type!r}, which are "
            f"many times slower than the fused ones: {choice.remedy}",
            RuntimeWarning,
        )
    return choice.kernels


def describe(kernels: Kernels, device: torch.device) -> str:
    """Describe an implementation in one line, for ``summary()``.

    Args:
        kernels: The implementation that runs.
        device: The device of the buckets.

    Returns:
        ``"compiled C (avx512)"``, ``"triton"``, or ``"reference"`` with the remedy, or with the reason
        if there is no remedy.
    """
    if kernels is reference:
        with contextlib.suppress(ImportError, ValueError):  # the variable has been changed since
            choice = choose(device)
            if choice.kernels is reference:
                why = choice.remedy or choice.reason.removeprefix("reference: ")
                return f"{kernels.name} ({why})"
    variant: str | None = getattr(kernels, "variant", None)  # an instruction set
    return f"compiled C ({variant})" if variant else kernels.name


_warned: set[str] = set()


def _for_cpu() -> Choice:
    from effadam_hook.kernels import cpu

    try:
        kernels = cpu.CpuKernels(cpu.load())
    except ImportError as error:
        return Choice(
            reference,
            f"reference: {error}",
            f"{error}. {_how_to_compile()}",
        )
    return Choice(kernels, f"cpu: compiled C, {kernels.variant}")


def _how_to_compile() -> str:
    if sys.platform == "win32":
        return (
            "Wheels for Windows carry no compiled kernels: MSVC does not compile the C sources. "
            "Run in WSL, or build the source archive's C files with Clang and name the library in "
            "EFFADAM_CPU_LIBRARY."
        )
    return (
        "Install a C compiler (gcc or clang) and reinstall effadam-hook with `pip install -v "
        "--no-cache-dir --force-reinstall --no-deps`; its log shows what a build lacks."
    )


def _for_cuda() -> Choice:
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
        return Choice(
            reference, f"reference: {missing}", f"{missing}. Install it: `pip install triton`."
        )
    try:
        from effadam_hook.kernels import triton_kernels
    except ImportError as error:  # too old
        return Choice(reference, f"reference: {error}", f"{error}")

    return Choice(triton_kernels, "triton: fused CUDA kernels")


def _force(name: str, device: torch.device) -> Choice:
    why = f"set by {KERNELS_VARIABLE}"
    if name == "reference":
        return Choice(reference, f"reference: {why}")
    if name not in _NAMES:
        raise ValueError(
            f"Invalid {KERNELS_VARIABLE}: {name!r}. Must be one of {', '.join(_NAMES)}, or unset for "
            "the fastest."
        )
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != {"cpu": "cpu", "triton": "cuda"}[name] and not interpreted:
        raise ImportError(
            f"{KERNELS_VARIABLE}={name} was given, but the bucket is on {device}. Unset the variable, "
            "or set it to 'reference'."
        )
    choice = _for_cpu() if name == "cpu" else _for_cuda()
    if choice.remedy is not None:
        raise ImportError(f"{KERNELS_VARIABLE}={name} was given, but {choice.remedy}")
    return Choice(choice.kernels, f"{choice.reason}, {why}")
