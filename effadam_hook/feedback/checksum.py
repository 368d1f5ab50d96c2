"""Checksum of a saved state, which reveals a damaged file before its values are used.

A flipped bit in a residual or a counter gives another plausible number. The checksum covers the bytes
of every tensor and every plain value. It does not depend on the order of dictionary keys, on the device
of tensors, or on the type of a sequence (list or tuple), so that ``torch.save`` and ``torch.load`` with
any ``map_location`` preserve it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHECKSUM_KEY", "MOST_BITS", "checksum_of", "foreign_entry", "with_checksum"]

CHECKSUM_KEY = "checksum"
"""Key of the checksum in a saved state."""

_DEEPEST = 16
MOST_BITS = 1 << 13
"""Bits of an integer; of longer ones Python refuses to write the digits."""


def with_checksum(state: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum to a state, or renew it after a change.

    Args:
        state: Tensors and plain values by name, nested.

    Returns:
        A dictionary with the same contents and their checksum.

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
    foreign = foreign_entry(state)
    if foreign is not None:
        raise TypeError(
            f"Invalid value in a saved state: {type(foreign[1]).__name__}. Must be a tensor, a number, "
            "a text, True, False or None, or a dictionary or list of such values."
        )
    return _extended(0, {key: value for key, value in state.items() if key != CHECKSUM_KEY})


def foreign_entry(value: Any, key: str = "", depth: int = 0) -> tuple[str, object] | None:
    """Find an entry that a saved state cannot hold.

    Args:
        value: Value to search, with all nested values.
        key: Key of the value, for the result.
        depth: Number of levels above the value.

    Returns:
        The dotted key and the value of the first entry that is neither a dense tensor nor a plain value
        (integers have at most :data:`MOST_BITS` bits); None if there is none.
    """
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        return None if dense and not (value.is_conj() or value.is_neg()) else (key, value)
    entries: list[tuple[str, Any]] = []
    if depth > _DEEPEST:
        return key, value
    if isinstance(value, Mapping):
        for name, item in value.items():
            entries += [(key, name), (f"{key}.{name}" if key else str(name), item)]
    elif isinstance(value, (list, tuple)):
        entries = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, int):
        return (key, value) if value.bit_length() > MOST_BITS else None
    elif value is not None and not isinstance(value, (float, str)):
        return key, value
    found = (foreign_entry(item, name, depth + 1) for name, item in entries)
    return next((entry for entry in found if entry is not None), None)


def _extended(crc: int, value: Any) -> int:
    """Extend a checksum by one more value."""
    if isinstance(value, Tensor):
        crc = zlib.crc32(f"tensor {value.dtype} {tuple(value.shape)};".encode(), crc)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy(), crc) if flat.numel() else crc  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        crc = zlib.crc32(f"mapping {len(value)};".encode(), crc)
        for key in sorted(value, key=repr):
            crc = _extended(_extended(crc, key), value[key])
        return crc
    if isinstance(value, (list, tuple)):
        crc = zlib.crc32(f"sequence {len(value)};".encode(), crc)
        for item in value:
            crc = _extended(crc, item)
        return crc
    return zlib.crc32(f"{type(value).__name__} {value!r};".encode(), crc)
