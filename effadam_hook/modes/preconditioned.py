"""Gradient mode in units of the root of Adam's second moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effadam_hook.errors import warn_caller
from effadam_hook.feedback.parameters import flat_view
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.modes.gradient import GradientMode
from effadam_hook.modes.mode import Content
from effadam_hook.optim.groups import group_settings
from effadam_hook.optim.wrappers import describe_kind, unwrapped
from effadam_hook.wire.layout import Slot
from effadam_hook.wire.node_layout import Run

__all__ = ["PreconditionedMode", "adam_of"]

_MARGIN = 0.1  # of β1, above which a run is clearly worse than with reduced_betas()


def adam_of(optimizer: Optimizer | None, named: Iterable[tuple[str, Tensor]]) -> Optimizer:
    """Check that an optimizer has the second moments of a model.

    Args:
        optimizer: The optimizer, possibly in a wrapper.
        named: Names and parameters of the model.

    Returns:
        The ``torch.optim.Adam`` or ``AdamW``, without wrappers.

    Raises:
        TypeError: If it is another optimizer.
        ValueError: If it lacks a parameter.
    """
    inner = unwrapped(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        raise TypeError(
            f"Invalid optimizer for precondition=True: {describe_kind(inner)}. Must be a "
            "torch.optim.Adam or AdamW, whose second moment is the same on all ranks."
        )
    own = {p for group in inner.param_groups for p in group["params"]}
    for name, parameter in named:
        if parameter.requires_grad and parameter not in own:
            raise ValueError(
                "Invalid optimizer for precondition=True: it lacks the parameter "
                f"{name!r}. Must be the optimizer of the model's parameters."
            )
    return inner


class PreconditionedMode(GradientMode):
    """Exchange of gradients that are divided by the root of the optimizer's second moment.

    Replicas are identical, and so are the second moments of their Adam: they need not be sent.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` of the model's parameters.
        parameter_of: Returns the optimizer's parameter, a DTensor, for the tensor that stands for this
            rank's shard in buckets; None if buckets have the optimizer's parameters.
    """

    name = "preconditioned gradient"

    def __init__(
        self, optimizer: Optimizer, parameter_of: Callable[[Tensor], Any] | None = None
    ) -> None:
        self._optimizer = optimizer
        self._parameter_of = parameter_of

    def describe(self) -> dict[str, Any]:
        """Return the class of the optimizer and its settings."""
        return {"optimizer": type(self._optimizer).__name__, **group_settings(self._optimizer)}

    def check_momentum(self, energy: float) -> None:
        """Warn of more momentum than few bits allow."""
        usual, reduced = 0.9, round(0.9 * energy, 2)
        for group in self._optimizer.param_groups:
            if group["betas"][0] > usual * energy + _MARGIN:
                warn_caller(
                    f"betas={tuple(group['betas'])} is much momentum for so few bits: error feedback "
                    "delays parts of the gradient, and momentum delays them again. Use "
                    f"effadam_hook.reduced_betas, which makes {reduced:g} of 0.9, or a quantizer with "
                    "more bits.",
                )
                return

    def content(
        self,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        dtype: torch.dtype,
        runs: Sequence[Run],
    ) -> Content:
        """Create a content that reads the second moments at every step."""
        return _PreconditionedContent(self._moment_of, parameters, compute_dtype(dtype))

    def _moment_of(self, parameter: Tensor) -> Tensor | None:
        of = self._parameter_of
        state = self._optimizer.state.get(parameter if of is None else of(parameter))
        moment = state.get("exp_avg_sq") if state else None
        return moment if of is None or moment is None else moment.to_local()


class _PreconditionedContent(Content):
    """The gradient of one bucket, and the second moments of its parameters."""

    def __init__(
        self,
        moment_of: Callable[[Tensor], Tensor | None],
        parameters: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._moment_of = moment_of
        self._parameters = list(parameters)
        self._dtype = dtype
        self._converted: dict[int, Tensor] = {}

    def begin(self) -> None:
        moments = [self._moment(index) for index in range(len(self._parameters))]
        known = any(moment is not None for moment in moments)
        self.preconditioner = Preconditioner(tuple(moments)) if known else None

    def _moment(self, index: int) -> Tensor | None:
        moment = self._moment_of(self._parameters[index])
        if moment is None:
            return None
        flat = flat_view(moment)
        if flat.dtype == self._dtype:
            return flat
        # Into the same memory at every step: kernels on a device keep a table of the addresses.
        if index not in self._converted:
            self._converted[index] = torch.empty_like(flat, dtype=self._dtype)
        return self._converted[index].copy_(flat)
