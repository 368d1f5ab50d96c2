"""Copies of small tensors from the host to a device, for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["upload"]


def upload(values: Tensor, device: torch.device, out: Tensor | None = None) -> Tensor:
    """Copy a tensor of the host to a device, in the order of the current stream.

    A copy from pageable memory may wait for earlier work of the stream. This one reads from pinned
    memory that torch keeps until the copy has ended, so that ``values`` can be overwritten at once.

    Args:
        values: A tensor on the CPU.
        device: The device.
        out: A tensor on the device of the same shape and dtype, which is overwritten; None for a new
            one.

    Returns:
        The copy; ``values`` itself if the device is the CPU and ``out`` is None.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    if out is None:
        return values.to(device, non_blocking=True)
    return out.copy_(values, non_blocking=True)
