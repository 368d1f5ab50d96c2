"""Weight mode: Quantized Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.feedback.parameters import flat_view
from effadam_hook.modes.mode import Content
from effadam_hook.modes.update import UpdateContent, UpdateMode
from effadam_hook.wire.layout import Piece, Slot
from effadam_hook.wire.node_layout import Run

__all__ = ["WeightMode"]


class WeightMode(UpdateMode):
    """Exchange of updates on the uplink and of quantized weights on the downlink.

    Servers keep the weights ``x``. The residual of a server is the difference of its weights to the
    quantized weights ``Q_x(x)`` of all replicas. Workers compute gradients at ``Q_x(x)``, and ``x``
    itself loses nothing.
    """

    name = "update up, weights down"
    undivided = "quantize_weights=True"
    units = "updates and weights"
    server_sign = -1  # updates are subtracted from weights
    matches = False  # servers apply the updates before any rank could correct them

    def content(
        self,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        dtype: torch.dtype,
        runs: Sequence[Run],
    ) -> Content:
        """Create a content whose servers apply the update."""
        return _WeightContent(self, parameters, slots, dtype, runs)


class _WeightContent(UpdateContent):
    """The moments of one bucket and its new weights."""

    sends_weights = True

    def apply_on_server(
        self, mean: Tensor, residual: Tensor | None, pieces: Sequence[Piece]
    ) -> None:
        for piece in pieces:
            here = slice(piece.local, piece.local + piece.numel)
            parameter = self._parameters[piece.slot]
            factor = self._recursion.remaining_weight(parameter)
            held = flat_view(parameter)[piece.offset : piece.offset + piece.numel]
            torch.sub(held.to(mean.dtype) * factor, mean[here], out=mean[here])
            if residual is not None:
                residual[here].mul_(factor)

    def finish(self, bucket: Tensor) -> None:
        assert self._update is not None
        for parameter, slot in self._items():
            here = slice(slot.start, slot.start + slot.numel)
            # The gradient that an optimizer would subtract: the old weights minus the new ones.
            bucket[here] = flat_view(parameter).to(self._update.dtype) - self._update[here]
        self._recursion.pending.deliver(self._views(self._update), replaces=True)
