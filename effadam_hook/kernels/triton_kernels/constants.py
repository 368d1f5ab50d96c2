"""Constants with which the Triton kernels are compiled."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from effadam_hook.kernels.triton_kernels.levels import packed_magnitudes
from effadam_hook.wire.layout import Wire
from effadam_hook.wire.quantizers import Quantizer

__all__ = [
    "blocks_of",
    "check_version",
    "decode_constants",
    "encode_constants",
    "marking_constants",
    "reduce_constants",
    "warps_of",
]

_TILE = 4096
_THREADS = 128
_RAW_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def check_version(version: str) -> None:
    """Check that this Triton compiles the kernels.

    Args:
        version: Version of Triton.

    Raises:
        ImportError: If it is older than 3.0.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (3, 0):
        raise ImportError(
            f"Triton {version} is too old. Must be 3.0 or newer, which comes with torch 2.4: install "
            "that, or set EFFADAM_KERNELS=reference"
        )


check_version(triton.__version__)


def blocks_of(wire: Wire) -> int:
    """Return the number of blocks of a tile.

    Args:
        wire: Any.

    Returns:
        The number for which a tile has 4096 places, at least 1. A thread then holds 32: eight planes
        of four columns.
    """
    return max(1, _TILE // (8 * _columns(wire)))


def _columns(wire: Wire) -> int:
    planes = 8 if wire.quantizer.is_raw else wire.quantizer.planes
    return int(triton.next_power_of_2(-(-wire.block_size // planes)))


@lru_cache
def warps_of(device: torch.device) -> int:
    """Return the number of warps of a program, which has 128 threads.

    With more threads, those of a block would hold different planes.

    Args:
        device: The device on which the kernels run. Warps of AMD's data center GPUs have 64 threads.
    """
    if device.type != "cuda":
        return 4
    properties = torch.cuda.get_device_properties(device)
    return _THREADS // int(getattr(properties, "warp_size", 64 if torch.version.hip else 32))


def encode_constants(wire: Wire, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of ``encode_kernel``, and options of the compiler.

    Args:
        wire: Layout of the payload.
        dtype: The dtype in which raw elements travel.
    """
    quantizing = _quantizing(wire.quantizer, wire.scale_rule)
    return {**decode_constants(wire, dtype), **quantizing}


def reduce_constants(uplink: Wire, downlink: Wire, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of ``reduce_encode_kernel``, and options of the compiler.

    Args:
        uplink: Layout of the payloads.
        downlink: Layout of the result.
        dtype: The dtype in which raw elements travel.
    """
    sent = {f"UP_{key}": value for key, value in _codes(uplink.quantizer).items()}
    return {**encode_constants(downlink, dtype), **sent}


def decode_constants(wire: Wire, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of ``decode_kernel``, and options of the compiler.

    Args:
        wire: Layout of the payload.
        dtype: The dtype in which raw elements travel.
    """
    codes, blocks = _codes(wire.quantizer), blocks_of(wire)
    return {
        **codes,
        "BLOCKS": blocks,
        "PART": max(1, blocks // 2),
        "SIZE": wire.block_size,
        "COLS": _columns(wire),
        "RAW": _RAW_TYPES[dtype],
        "RAW_BYTES": dtype.itemsize,
        # Multiply and add are not fused: the residual is exactly the difference to what is sent.
        "enable_fp_fusion": False,
    }


def marking_constants(constants: dict[str, Any], raw: bool = False) -> dict[str, Any]:
    """Return the constants of the kernels that find unused parameters.

    Args:
        constants: Those of the kernel that follows, with the same tiles.
        raw: Whether to include those of raw elements.
    """
    names = ("SIZE", "BLOCKS", *(("RAW", "RAW_BYTES") if raw else ()))
    return {**{name: constants[name] for name in names}, "WIDTH": 256}


@lru_cache
def _codes(quantizer: Quantizer) -> dict[str, int]:
    return {
        "PLANES": 8 if quantizer.is_raw else quantizer.planes,
        "PLANE_BYTES": quantizer.plane_bytes,
        "LEVELS": packed_magnitudes(quantizer),
        "MAGNITUDES": len(quantizer.magnitudes),
        "HAS_ZERO": int(quantizer.has_zero),
    }


@lru_cache
def _quantizing(quantizer: Quantizer, scale_rule: str) -> dict[str, float]:
    magnitudes = quantizer.magnitudes
    return {
        "ABSMAX": int(scale_rule == "absmax"),
        "SPREAD": quantizer.spread or 0.0,
        "TOP": magnitudes[-1] if magnitudes else 1.0,
        "LARGEST_SCALE": 0.0 if quantizer.is_raw else quantizer.largest_scale,
    }
