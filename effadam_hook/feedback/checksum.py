"""Checksum of a saved state, so that a damaged file is noticed before it is trusted.

A bit that flips in a residual or a counter leaves a number that is as plausible as the right one. The
checksum covers the bytes of every tensor and every plain value. It does not depend on the order of a
dictionary's keys, on the device of a tensor, or on whether a sequence is a list or a tuple, so that it
is the same after ``torch.save`` and ``torch.load`` with any ``map_location``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHECKSUM_KEY", "checksum_of", "with_checksum"]

CHECKSUM_KEY = "checksum"
"""Where a saved state holds its own checksum."""


def with_checksum(state: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum to a state, or renew it after a change.

    Args:
        state: Tensors and plain values by name, nested.

    Returns:
        A dictionary with the same contents and the checksum of all of them.

    Raises:
        TypeError: If a value is neither a tensor nor a plain value.
    """
    contents = {key: value for key, value in state.items() if key != CHECKSUM_KEY}
    return {**contents, CHECKSUM_KEY: checksum_of(contents)}


def checksum_of(state: Mapping[str, Any]) -> int:
    """Compute the checksum of a state.

    Args:
        state: Tensors and plain values by name, nested. An entry ``"checksum"`` at the top is left out.

    Returns:
        The CRC-32 of all contents.

    Raises:
        TypeError: If a value is neither a tensor nor a plain value.
    """
    return _continued(0, {key: value for key, value in state.items() if key != CHECKSUM_KEY})


def _continued(crc: int, value: Any) -> int:
    """The checksum of what has been seen so far and of one more value."""
    if isinstance(value, Tensor):
        crc = zlib.crc32(f"tensor {value.dtype} {tuple(value.shape)};".encode(), crc)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy(), crc) if flat.numel() else crc  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        crc = zlib.crc32(f"mapping {len(value)};".encode(), crc)
        for key in sorted(value, key=repr):
            crc = _continued(_continued(crc, key), value[key])
        return crc
    if isinstance(value, (list, tuple)):
        crc = zlib.crc32(f"sequence {len(value)};".encode(), crc)
        for item in value:
            crc = _continued(crc, item)
        return crc
    if value is None or isinstance(value, (bool, int, float, str)):
        return zlib.crc32(f"{type(value).__name__} {value!r};".encode(), crc)
    raise TypeError(
        f"Invalid value in a saved state: {type(value).__name__}. Must be a tensor, a number, a text, "
        "True, False or None, or a dictionary or list of such values."
    )
