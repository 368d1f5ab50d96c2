"""Unused parameters of a step, which send nothing and keep their residuals.

The gradient of a parameter is exactly zero if no output depends on it, or if all of its rows are
masked. On a rank that ``join()`` keeps shadowing after its data has run out, all gradients are
zero. If residuals were sent in these cases, DDP would discard them with the gradients of unused
parameters, a rank without data would contribute old gradients to the mean, and a quantizer without
a level at zero would send a gradient that does not exist. The kernels therefore neither send nor
change the residuals of unused parameters, if they get a buffer ``used`` for the flags of the slots.

This module finds them on the CPU: the host reads a few elements of each parameter, and the others
only if those are zero. On a device the kernels find them, as the host would have to wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from effadam_hook.wire.layout import Wire
from effadam_hook.wire.quantizers import SCALE_BYTES

__all__ = ["Unused", "put_aside_input", "put_aside_mean"]

_PROBES = 4
_RUN = 1 << 16
_FORMATS: dict[int, Literal["H", "I", "Q"]] = {2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True)
class _Span:
    """Range of one parameter in each row of the tensor to be checked, and in the residual."""

    slot: int
    first: int
    last: int
    residual_first: int
    residual_last: int


class Unused:
    """Parameters for which the rows of a tensor are exactly zero.

    Args:
        spans: Range of each parameter, in elements of ``dtype``.
        dtype: Dtype as which the rows are read; None for their own.
    """

    def __init__(self, spans: Sequence[_Span], dtype: torch.dtype | None = None) -> None:
        self._spans = [span for span in spans if span.last > span.first]
        self._dtype = dtype
        self._key: tuple[int, torch.dtype, torch.Size] | None = None
        self._rows = torch.empty(0)
        self._bits = memoryview(b"")
        self._probes = [
            [span.first + i * (span.last - span.first - 1) // (_PROBES - 1) for i in range(_PROBES)]
            for span in self._spans
        ]

    @contextlib.contextmanager
    def put_aside(self, probed: Tensor, residual: Tensor, used: Tensor) -> Iterator[None]:
        """Set the residuals of unused parameters to zero within a context.

        Args:
            probed: ``[numel]`` or ``[rows, bytes]``, the tensor to be checked; contiguous.
            residual: ``[numel]``; keeps the residuals of unused parameters.
            used: ``[slots]`` int32, overwritten: 0 for unused parameters.
        """
        used.fill_(1)
        unused = self._find(probed) if self._spans else []
        for span in unused:
            used[span.slot] = 0
        with _hidden(residual, unused):
            yield

    def _find(self, probed: Tensor) -> list[_Span]:
        # Through a memory view, as an operator of torch takes longer than the whole check. DDP passes
        # the same buffer in every step, and the rows prevent that its address is used again.
        key = (probed.data_ptr(), probed.dtype, probed.shape)
        if key != self._key:
            self._key = key
            rows = probed.view(-1, probed.shape[-1])
            self._rows = rows if self._dtype is None else rows.view(self._dtype)
            data = memoryview(self._rows.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            self._bits = data.cast(_FORMATS[self._rows.element_size()])
        bits = self._bits
        magnitude = (1 << (8 * self._rows.element_size() - 1)) - 1
        return [
            span
            for span, probes in zip(self._spans, self._probes, strict=True)
            if not any(bits[at] & magnitude for at in probes)
            and not any(_any(row, span.first, span.last) for row in self._rows)
        ]


_inputs: WeakKeyDictionary[Wire, Unused] = WeakKeyDictionary()
_means: WeakKeyDictionary[Wire, dict[tuple[int, torch.dtype], Unused]] = WeakKeyDictionary()


def put_aside_input(
    wire: Wire, x: Tensor, residual: Tensor | None, used: Tensor | None
) -> AbstractContextManager[None]:
    """Put aside the residuals of parameters whose gradient is exactly zero.

    Args:
        wire: Layout of the uplink.
        x: ``[numel]``, the bucket.
        residual: ``[numel]``; None without error feedback.
        used: ``[slots]`` int32, overwritten; None if no parameter counts as unused.

    Returns:
        A context for the kernel.
    """
    if residual is None or used is None:
        return contextlib.nullcontext()
    if wire not in _inputs:
        _inputs[wire] = Unused(_input_spans(wire))
    return _inputs[wire].put_aside(x, residual, used)


def put_aside_mean(
    uplink: Wire,
    downlink: Wire,
    server: int,
    payloads: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    used: Tensor | None,
) -> AbstractContextManager[None]:
    """Put aside the residuals of parameters for which no worker has sent anything but zeros.

    Args:
        uplink: Layout of the uplink.
        downlink: Layout of the downlink.
        server: Index of the chunk.
        payloads: ``[world_size, stride_bytes]`` uint8, the workers' chunks.
        residual: ``[chunk numel]``; None without error feedback.
        dtype: The dtype in which raw elements travel.
        used: ``[slots]`` int32, overwritten; None if no parameter counts as unused.

    Returns:
        A context for the kernel.
    """
    if residual is None or used is None:
        return contextlib.nullcontext()
    known, key = _means.setdefault(downlink, {}), (server, dtype)
    if key not in known:
        sent = dtype if uplink.quantizer.is_raw else torch.bfloat16
        known[key] = Unused(_mean_spans(uplink, downlink, server, sent), sent)
    return known[key].put_aside(payloads, residual, used)


def _input_spans(wire: Wire) -> list[_Span]:
    pieces = [piece for chunk in wire.chunks for piece in chunk.pieces if not piece.raw]
    spans = []
    for slot in sorted({piece.slot for piece in pieces}):
        start = min(piece.start for piece in pieces if piece.slot == slot)
        end = max(piece.start + piece.numel for piece in pieces if piece.slot == slot)
        spans.append(_Span(slot, start, end, start, end))
    return spans


def _mean_spans(uplink: Wire, downlink: Wire, server: int, sent: torch.dtype) -> list[_Span]:
    spans = []
    pieces = zip(uplink.chunks[server].pieces, downlink.chunks[server].pieces, strict=True)
    for source, target in pieces:
        if target.raw:
            continue
        # Nothing was sent if all scales are zero, or all elements of a raw piece.
        at, size = source.scales_at, -(-source.numel // uplink.block_size) * SCALE_BYTES
        if source.raw:
            at, size = source.data_at, source.numel * uplink.itemsize
        first, last = at // sent.itemsize, (at + size) // sent.itemsize
        spans.append(_Span(source.slot, first, last, target.local, target.local + target.numel))
    return spans


def _any(values: Tensor, first: int, last: int) -> bool:
    return any(
        bool(values[start : min(start + _RUN, last)].any()) for start in range(first, last, _RUN)
    )


@contextlib.contextmanager
def _hidden(residual: Tensor, spans: Sequence[_Span]) -> Iterator[None]:
    views = [residual[span.residual_first : span.residual_last] for span in spans]
    kept = [view.clone() for view in views]
    for view in views:
        view.zero_()
    try:
        yield
    finally:
        for view, value in zip(views, kept, strict=True):
            view.copy_(value)
