"""Unused parameters of a step, which send nothing and keep their residuals.

The gradient of a parameter is exactly zero if no output depends on it, or if all of its rows are
masked. On a rank that ``join()`` keeps shadowing after its data has run out, all gradients are
zero. If residuals were sent in these cases, DDP would discard them with the gradients of unused
parameters, a rank without data would contribute old gradients to the mean, and a quantizer without
a level at zero would send a gradient that does not exist. The residuals are therefore set to zero
for the kernel, and restored after it.

The check reads a few elements of each parameter, and the others only if those are zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effadam_hook.wire.layout import Wire
from effadam_hook.wire.quantizers import SCALE_BYTES

__all__ = ["UnusedInput", "UnusedMean"]

_PROBES = 4
_RUN = 1 << 16


@dataclass(frozen=True)
class _Span:
    """Range of one parameter in the tensor to be checked, and in the residual."""

    first: int
    last: int
    residual_first: int
    residual_last: int


class _Unused:
    def __init__(self, spans: Sequence[_Span]) -> None:
        self._spans = [span for span in spans if span.last > span.first]
        self._address = -1
        self._data = memoryview(b"")
        self._probes = [
            [span.first + i * (span.last - span.first - 1) // (_PROBES - 1) for i in range(_PROBES)]
            for span in self._spans
        ]

    def _find(self, probed: Tensor, is_zero: Callable[[_Span], bool]) -> list[_Span]:
        if not self._spans:
            return []
        # Through a memory view, as an operator of torch takes longer than the whole check. DDP passes
        # the same buffer in every step, and the view prevents that its address is used again.
        if probed.data_ptr() != self._address:
            self._address = probed.data_ptr()
            self._data = memoryview(probed.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        data, size = self._data, probed.element_size()
        return [
            span
            for span, probes in zip(self._spans, self._probes, strict=True)
            if not any(any(data[at * size : (at + 1) * size]) for at in probes) and is_zero(span)
        ]


class UnusedInput(_Unused):
    """Parameters of a bucket whose gradient is exactly zero.

    Args:
        wire: Layout of the uplink.
    """

    def __init__(self, wire: Wire) -> None:
        pieces = [piece for chunk in wire.chunks for piece in chunk.pieces if not piece.raw]
        slots = sorted({piece.slot for piece in pieces})
        spans = []
        for slot in slots:
            start = min(piece.start for piece in pieces if piece.slot == slot)
            end = max(piece.start + piece.numel for piece in pieces if piece.slot == slot)
            spans.append(_Span(start, end, start, end))
        super().__init__(spans)

    @contextlib.contextmanager
    def put_aside(self, bucket: Tensor, residual: Tensor) -> Iterator[None]:
        """Set the residuals of unused parameters to zero within a context.

        Args:
            bucket: ``[numel]``, the gradients.
            residual: ``[numel]``.
        """
        unused = self._find(bucket, lambda span: not _any(bucket, span.first, span.last))
        with _hidden(residual, unused):
            yield


class UnusedMean(_Unused):
    """Parameters of a chunk for which no worker has sent anything.

    Args:
        uplink: Layout of the uplink.
        downlink: Layout of the downlink.
        server: Index of the chunk.
    """

    def __init__(self, uplink: Wire, downlink: Wire, server: int) -> None:
        spans = []
        pieces = zip(uplink.chunks[server].pieces, downlink.chunks[server].pieces, strict=True)
        for piece, sent in pieces:
            if sent.raw:
                continue
            # Nothing was sent if all scales are zero, or all elements of a raw piece.
            at, size = piece.scales_at, -(-piece.numel // uplink.block_size) * SCALE_BYTES
            if piece.raw:
                at, size = piece.data_at, piece.numel * uplink.itemsize
            spans.append(_Span(at, at + size, piece.local, piece.local + piece.numel))
        super().__init__(spans)

    @contextlib.contextmanager
    def put_aside(self, received: Tensor, residual: Tensor) -> Iterator[None]:
        """Set the residuals of unused parameters to zero within a context.

        Args:
            received: ``[world_size, stride_bytes]`` uint8.
            residual: ``[chunk numel]``.
        """
        unused = self._find(
            received,
            lambda span: not any(_any(row, span.first, span.last) for row in received),
        )
        with _hidden(residual, unused):
            yield


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
