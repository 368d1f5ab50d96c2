"""The three kernels that carry all the arithmetic, and the choice between their implementations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from effadam_hook.kernels import reference
from effadam_hook.layout import Wire

__all__ = ["Kernels", "select"]


class Kernels(Protocol):
    """What an implementation provides; :mod:`effadam_hook.kernels.reference` documents and defines it."""

    @property
    def name(self) -> str:
        """Name of the implementation, as ``summary()`` shows it."""
        ...

    def encode_(
        self, wire: Wire, x: Tensor, residual: Tensor | None, payload: Tensor, dtype: torch.dtype
    ) -> None:
        """Worker side: quantize ``x + residual``, keep the error in ``residual``."""
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
    ) -> None:
        """Server side: average, add ``residual``, quantize again, keep the error in ``residual``."""
        ...

    def decode(self, wire: Wire, payload: Tensor, out: Tensor, dtype: torch.dtype) -> None:
        """Everywhere: write what a payload stands for."""
        ...


def select(device: torch.device) -> Kernels:
    """The best implementation for a device.

    Args:
        device: Where the buckets live.

    Returns:
        An implementation of the three kernels.
    """
    return reference
