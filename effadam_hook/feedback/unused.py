"""Unused parameters of a step, which send nothing and keep their residuals.

The gradient of a parameter is exactly zero if no output depends on it, or if all of its rows are
masked. On a rank that ``join()`` keeps shadowing after its data has run out, all gradients are
zero. If residuals were sent in these cases, DDP would discard them with the gradients of unused
parameters, a rank without data would contribute old gradients to the mean, and a quantizer without
a level at zero would send a gradient that does not exist. The residuals are therefore set to zero
for the kernel, and restored after it.

On the CPU the host looks: it reads a few elements of each parameter, and the others only if those are
zero. On a device the host would have to wait for the gradient. There the norms of all parameters, taken
together, decide on the device which elements of the residual the kernel gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from effadam_hook.wire.layout import Wire
from effadam_hook.wire.quantizers import SCALE_BYTES

__all__ = ["Unused", "UnusedInput", "UnusedMean", "put_aside"]

_PROBES = 4
_RUN = 1 << 16


@dataclass(frozen=True)
class _Span:
    """Range of one parameter in each row of the tensor to be checked, and in the residual."""

    first: int
    last: int
    residual_first: int
    residual_last: int


class Unused:
    """Parameters for which the rows of a tensor are exactly zero.

    Args:
        spans: Range of each parameter.
        dtype: Dtype as which a device reads the rows; None for their own.
        looks: Whether the host reads the tensor.
    """

    def __init__(self, spans: Sequence[_Span], dtype: torch.dtype | None, looks: bool) -> None:
        self._spans = [span for span in spans if span.last > span.first]
        self._dtype = dtype
        self._looks = looks
        self._address = -1
        self._data = memoryview(b"")
        self._views: list[Tensor] = []
        self._segments: tuple[Tensor, Tensor, Tensor] | None = None
        self._probes = [
            [span.first + i * (span.last - span.first - 1) // (_PROBES - 1) for i in range(_PROBES)]
            for span in self._spans
        ]

    @contextlib.contextmanager
    def put_aside(self, probed: Tensor, residual: Tensor) -> Iterator[Tensor]:
        """Set the residuals of unused parameters to zero within a context.

        Args:
            probed: ``[numel]`` or ``[rows, bytes]``, the tensor to be checked; contiguous.
            residual: ``[numel]``; keeps the residuals of unused parameters.

        Yields:
            The residual for the kernel.
        """
        if not self._spans:
            yield residual
        elif self._looks:
            with _hidden(residual, self._find(probed)):
                yield residual
        else:
            is_unused = self._mask(probed, residual)
            held = torch.where(is_unused, 0.0, residual)
            yield held
            torch.where(is_unused, residual, held, out=residual)

    def _find(self, probed: Tensor) -> list[_Span]:
        # Through a memory view, as an operator of torch takes longer than the whole check. DDP passes
        # the same buffer in every step, and the view prevents that its address is used again.
        if probed.data_ptr() != self._address:
            self._address = probed.data_ptr()
            self._data = memoryview(probed.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        data, size = self._data, probed.element_size()
        rows = probed.view(-1, probed.shape[-1])
        return [
            span
            for span, probes in zip(self._spans, self._probes, strict=True)
            if not any(any(data[at * size : (at + 1) * size]) for at in probes)
            and not any(_any(row, span.first, span.last) for row in rows)
        ]

    def _mask(self, probed: Tensor, residual: Tensor) -> Tensor:
        """Return for every element of the residual whether its parameter is unused, on the device."""
        # The views keep the buffer, so that no other can come to lie at its address.
        if probed.data_ptr() != self._address:
            self._address = probed.data_ptr()
            rows = probed.view(-1, probed.shape[-1])
            spans = [row[span.first : span.last] for row in rows for span in self._spans]
            self._views = [
                view if self._dtype is None else view.view(self._dtype) for view in spans
            ]
        if self._segments is None:
            self._segments = self._segments_of(residual)
        # One kernel for many views, where a comparison of each would be one per parameter.
        norms = torch.stack(torch._foreach_norm(self._views, torch.inf))
        is_used = (norms.view(-1, len(self._spans)) != 0).any(0)
        flags, order, numels = self._segments
        flags[: len(self._spans)] = ~is_used
        return flags[order].repeat_interleave(numels, output_size=residual.numel())

    def _segments_of(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divide the residual into the spans and the gaps between them, whose flag is the last one."""
        order: list[int] = []
        numels: list[int] = []
        end = 0
        for index in sorted(range(len(self._spans)), key=lambda i: self._spans[i].residual_first):
            span = self._spans[index]
            order += [len(self._spans), index]
            numels += [span.residual_first - end, span.residual_last - span.residual_first]
            end = span.residual_last
        order.append(len(self._spans))
        numels.append(residual.numel() - end)
        device = residual.device
        flags = torch.zeros(len(self._spans) + 1, dtype=torch.bool, device=device)
        return flags, torch.tensor(order, device=device), torch.tensor(numels, device=device)


class UnusedInput(Unused):
    """Parameters of a bucket whose gradient is exactly zero; the tensor to be checked is the bucket.

    Args:
        wire: Layout of the uplink.
        looks: Whether the host reads the bucket.
    """

    def __init__(self, wire: Wire, looks: bool) -> None:
        pieces = [piece for chunk in wire.chunks for piece in chunk.pieces if not piece.raw]
        slots = sorted({piece.slot for piece in pieces})
        spans = []
        for slot in slots:
            start = min(piece.start for piece in pieces if piece.slot == slot)
            end = max(piece.start + piece.numel for piece in pieces if piece.slot == slot)
            spans.append(_Span(start, end, start, end))
        super().__init__(spans, None, looks)


class UnusedMean(Unused):
    """Parameters of a chunk for which no worker has sent anything; the rows are the workers' chunks.

    Args:
        uplink: Layout of the uplink.
        downlink: Layout of the downlink.
        server: Index of the chunk.
        dtype: Dtype of the uncompressed elements in the chunks.
        looks: Whether the host reads the chunks.
    """

    def __init__(
        self, uplink: Wire, downlink: Wire, server: int, dtype: torch.dtype, looks: bool
    ) -> None:
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
        sent_dtype = dtype if uplink.quantizer.is_raw else torch.bfloat16
        super().__init__(spans, sent_dtype, looks)


def put_aside(
    unused: Unused | None, probed: Tensor, residual: Tensor | None
) -> AbstractContextManager[Tensor | None]:
    """Set the residuals of unused parameters to zero within a context, if there are any.

    Args:
        unused: Finds the parameters; None if none can be unused.
        probed: The tensor to be checked, see :meth:`Unused.put_aside`.
        residual: ``[numel]``; None without error feedback.

    Returns:
        A context with the residual for the kernel.
    """
    if unused is None or residual is None:
        return contextlib.nullcontext(residual)
    return unused.put_aside(probed, residual)


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
