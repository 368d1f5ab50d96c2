"""The three kernels for CPU tensors: checks of the arguments, and one call into compiled C.

The C source in ``csrc`` does not depend on torch. It receives addresses, and the pieces of a wire as a
table of integers. Its results are bit-identical to :mod:`effadam_hook.kernels.reference` with every
instruction set, which is selected at run time.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from effadam_hook.kernels.arguments import check_arguments
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.kernels.levels import TABLE_CODES, TABLE_THRESHOLDS, is_linear, level_table
from effadam_hook.kernels.unused import put_aside_input, put_aside_mean
from effadam_hook.wire.layout import Wire
from effadam_hook.wire.quantizers import Quantizer

__all__ = ["CpuKernels", "libraries", "load"]

_ABI_VERSION = 1
_LIBRARY_VARIABLE = "EFFADAM_CPU_LIBRARY"
_SUFFIXES = (".so", ".dylib", ".dll")
_MAX_BLOCK = 4096
_STORES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ENCODE, _REDUCE_ENCODE, _DECODE = range(3)


class _Quantizer(ctypes.Structure):
    _fields_ = (
        ("planes", ctypes.c_int32),
        ("plane_bytes", ctypes.c_int32),
        ("magnitudes", ctypes.c_int32),
        ("has_zero", ctypes.c_int32),
        ("linear", ctypes.c_int32),
        ("absmax", ctypes.c_int32),
        ("spread", ctypes.c_double),
        ("top", ctypes.c_double),
        ("largest_scale", ctypes.c_double),
        ("levels", ctypes.c_float * TABLE_CODES),
        ("thresholds", ctypes.c_float * TABLE_THRESHOLDS),
    )


class _Wire(ctypes.Structure):
    _fields_ = (
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("quantizer", _Quantizer),
    )


class _Adam(ctypes.Structure):
    _fields_ = (
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        ("task", ctypes.c_int),
        ("wire", ctypes.POINTER(_Wire)),
        ("uplink", ctypes.POINTER(_Wire)),
        ("x", ctypes.c_void_p),
        ("x_store", ctypes.c_int32),
        ("raw_store", ctypes.c_int32),
        ("residual", ctypes.c_void_p),
        ("payload", ctypes.c_void_p),
        ("payloads", ctypes.c_void_p),
        ("workers", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("moments", ctypes.POINTER(ctypes.c_void_p)),
        ("adam", ctypes.POINTER(_Adam)),
    )


@dataclass(frozen=True)
class _WireTables:
    """A wire in the structures of C: all chunks as one list of pieces, and each chunk alone.

    Attributes:
        rows: The tables of pieces, to which the structures hold addresses.
        whole: All chunks.
        chunks: Each chunk.
    """

    rows: tuple[array[int], ...]
    whole: _Wire
    chunks: tuple[_Wire, ...]


_tables: WeakKeyDictionary[Wire, _WireTables] = WeakKeyDictionary()


class CpuKernels:
    """The compiled kernels.

    Args:
        library: The loaded shared library.
        variant: Instruction set, one of :attr:`variants`; None selects the fastest.

    Attributes:
        variants: Instruction sets that this build has and this processor supports, fastest first.
        variant: The selected one.

    Raises:
        ValueError: If this processor does not support the variant.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL, variant: str | None = None) -> None:
        self._library = library
        self.variants = _variants(library)
        if variant is None:
            variant = self.variants[0]
        if variant not in self.variants:
            raise ValueError(
                f"Invalid variant: {variant!r}. Must be one of {', '.join(self.variants)}, "
                "the instruction sets of this build that this processor supports."
            )
        self.variant = variant
        self._variant_index = self.variants.index(variant)

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
        """Quantize ``x + residual``; see :func:`effadam_hook.kernels.reference.encode_`."""
        check_arguments(
            wire,
            dtype,
            bucket=x,
            residual=residual,
            payload=payload,
            preconditioner=preconditioner,
            adam=adam,
            used=used,
        )
        job = _Job(
            task=_ENCODE,
            wire=ctypes.pointer(_tables_of(wire).whole),
            x=x.data_ptr(),
            x_store=_STORES[x.dtype],
            residual=None if residual is None else residual.data_ptr(),
            payload=payload.data_ptr(),
        )
        if adam is not None:
            terms = adam.terms.contiguous()
            addresses = (adam.exp_avg.data_ptr(), adam.exp_avg_sq.data_ptr(), terms.data_ptr())
            job.adam = ctypes.pointer(_Adam(*addresses))
        with put_aside_input(wire, x, residual, used):
            self._run(job, dtype, preconditioner)

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
        """Average and quantize; see :func:`effadam_hook.kernels.reference.reduce_encode_`."""
        check_arguments(
            downlink,
            dtype,
            server=server,
            uplink=uplink,
            payloads=payloads,
            residual=residual,
            payload=payload,
            preconditioner=preconditioner,
            used=used,
        )
        job = _Job(
            task=_REDUCE_ENCODE,
            wire=ctypes.pointer(_tables_of(downlink).chunks[server]),
            uplink=ctypes.pointer(_tables_of(uplink).chunks[server]),
            residual=None if residual is None else residual.data_ptr(),
            payload=payload.data_ptr(),
            payloads=payloads.data_ptr(),
            workers=payloads.shape[0],
            stride=payloads.shape[1],
        )
        with put_aside_mean(uplink, downlink, server, payloads, residual, dtype, used):
            self._run(job, dtype, preconditioner)

    def decode(
        self,
        wire: Wire,
        payload: Tensor,
        out: Tensor,
        dtype: torch.dtype,
        *,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        """Dequantize; see :func:`effadam_hook.kernels.reference.decode`."""
        check_arguments(wire, dtype, bucket=out, payload=payload, preconditioner=preconditioner)
        job = _Job(
            task=_DECODE,
            wire=ctypes.pointer(_tables_of(wire).whole),
            x=out.data_ptr(),
            x_store=_STORES[out.dtype],
            payload=payload.data_ptr(),
        )
        self._run(job, dtype, preconditioner)

    def _run(self, job: _Job, dtype: torch.dtype, preconditioner: Preconditioner | None) -> None:
        job.raw_store = _STORES[dtype]
        if preconditioner is not None:
            addresses = [
                None if moment is None else moment.data_ptr()
                for moment in preconditioner.second_moments
            ]
            job.moments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._library.effadam_run(
            ctypes.byref(job),
            self._variant_index,
            int(dtype == torch.float64),
            torch.get_num_threads(),
        )


def libraries() -> list[Path]:
    """List the shared libraries beside this module, in the order in which they are tried.

    Returns:
        Paths; ``_cpu.so``, ``_cpu.dylib`` or ``_cpu.dll`` first, then libraries with a longer name,
        such as those that earlier versions built for one version of Python.
    """
    found = [path for path in Path(__file__).parent.glob("_cpu*") if path.suffix in _SUFFIXES]
    return sorted(found, key=lambda path: (path.stem != "_cpu", path.name))


@cache
def load() -> ctypes.CDLL:
    """Load the shared library that was built with the package.

    The environment variable ``EFFADAM_CPU_LIBRARY`` names another build, such as one with sanitizers.

    Returns:
        The library.

    Raises:
        ImportError: If there is no library, or none fits this version and this system.
    """
    other = os.environ.get(_LIBRARY_VARIABLE)
    built = [Path(other)] if other else libraries()
    if not built:
        names = " or ".join(f"_cpu{suffix}" for suffix in _SUFFIXES)
        raise ImportError(f"no compiled library {names} in {Path(__file__).parent}")
    reasons = []
    for path in built:
        try:
            library = ctypes.CDLL(str(path.absolute()))
            library.effadam_abi_version.restype = ctypes.c_int32
            version = library.effadam_abi_version()
        except (OSError, AttributeError) as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if version != _ABI_VERSION:
            reasons.append(f"{path.name}: built for interface {version}, not {_ABI_VERSION}")
            continue
        library.effadam_run.restype = None
        library.effadam_run.argtypes = (ctypes.POINTER(_Job), *[ctypes.c_int32] * 3)
        return library
    raise ImportError("; ".join(reasons))


def _variants(library: ctypes.CDLL) -> tuple[str, ...]:
    library.effadam_variant_name.restype = ctypes.c_char_p
    library.effadam_variant_name.argtypes = (ctypes.c_int32,)
    names: list[str] = []
    while (name := library.effadam_variant_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def _tables_of(wire: Wire) -> _WireTables:
    tables = _tables.get(wire)
    if tables is None:
        tables = _tables[wire] = _make_tables(wire)
    return tables


def _make_tables(wire: Wire) -> _WireTables:
    if not 1 <= wire.block_size <= _MAX_BLOCK:
        raise ValueError(
            f"Invalid block_size: {wire.block_size}. Must be from 1 to {_MAX_BLOCK} for the compiled "
            "CPU kernels."
        )
    quantizer = _describe(wire.quantizer, wire.scale_rule)
    whole = array("q")
    for server, chunk in enumerate(wire.chunks):
        shift = server * wire.stride_bytes
        for piece in chunk.pieces:
            start, local, numel, raw, scales_at, data_at, slot, offset = piece.row()
            row = (start, local, numel, raw, scales_at + shift, data_at + shift, slot, offset)
            whole.extend(row)
    rows = (whole, *wire.tables)
    counts = (sum(len(c.pieces) for c in wire.chunks), *(len(c.pieces) for c in wire.chunks))
    wires = [
        _Wire(row.buffer_info()[0], count, wire.block_size, quantizer)
        for row, count in zip(rows, counts, strict=True)
    ]
    return _WireTables(rows, wires[0], tuple(wires[1:]))


def _describe(quantizer: Quantizer, scale_rule: str) -> _Quantizer:
    described = _Quantizer(planes=quantizer.planes, plane_bytes=quantizer.plane_bytes)
    if quantizer.is_raw:
        return described
    magnitudes = quantizer.magnitudes
    described.magnitudes = len(magnitudes)
    described.has_zero = int(quantizer.has_zero)
    described.linear = int(is_linear(quantizer))
    described.absmax = int(scale_rule == "absmax")
    described.spread = quantizer.spread or 0.0
    described.top = magnitudes[-1]
    described.largest_scale = quantizer.largest_scale
    levels = level_table(quantizer)
    if levels:
        described.levels[: len(levels)] = levels
        described.thresholds[: len(magnitudes) - 1] = quantizer.thresholds
    return described
