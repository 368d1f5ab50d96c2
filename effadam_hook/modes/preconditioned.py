"""Gradient mode in units of the root of Adam's second moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effadam_hook.feedback.parameters import flat_view
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.modes.gradient import GradientMode
from effadam_hook.modes.mode import Content
from effadam_hook.optim.groups import group_settings
from effadam_hook.wire.layout import Slot
from effadam_hook.wire.node_layout import Run

__all__ = ["PreconditionedMode"]


class PreconditionedMode(GradientMode):
    """Exchange of gradients that are divided by the root of the optimizer's second moment.

    Replicas are identical, and so are the second moments of their Adam: they need not be sent.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` of the DDP model's parameters.
    """

    name = "preconditioned gradient"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def describe(self) -> dict[str, Any]:
        """Return the class of the optimizer and its settings."""
        return {"optimizer": type(self._optimizer).__name__, **group_settings(self._optimizer)}

    def content(
        self,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        dtype: torch.dtype,
        runs: Sequence[Run],
    ) -> Content:
        """Create a content that reads the second moments at every step."""
        return _PreconditionedContent(self._optimizer, parameters, compute_dtype(dtype))


class _PreconditionedContent(Content):
    """The gradient of one bucket, and the second moments of its parameters."""

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._dtype = dtype

    def begin(self) -> None:
        moments = [self._moment(parameter) for parameter in self._parameters]
        known = any(moment is not None for moment in moments)
        self.preconditioner = Preconditioner(tuple(moments)) if known else None

    def _moment(self, parameter: Tensor) -> Tensor | None:
        state = self._optimizer.state.get(parameter)
        moment: Tensor | None = state.get("exp_avg_sq") if state else None
        return None if moment is None else flat_view(moment.to(self._dtype))
