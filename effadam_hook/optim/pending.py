"""The results of an exchange, from the end of its backward to the optimizer's next step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from effadam_hook.errors import EffAdamError

__all__ = ["MomentStep", "PendingStep"]


class MomentStep(NamedTuple):
    """The treatment of a parameter's moments in one step.

    Attributes:
        beta1: The weight of the first moment.
        beta2: The weight of the second moment; 1 where it is constant.
        follows: Whether the second moment follows the gradient.
    """

    beta1: float
    beta2: float
    follows: bool


class PendingStep:
    """Results that the next optimizer step applies.

    A step reads them here, never from ``.grad``. ``.grad`` only decides which parameters are stepped,
    as in every optimizer of torch: those whose ``.grad`` is not None.

    Attributes:
        updates: By parameter, the decoded result in the parameter's shape: the update δ̃, or the new
            weights.
        replaces: Whether ``updates`` are new weights.
        means: By parameter that was averaged densely, the mean gradient; None if ``.grad`` contains it.
        moments: By parameter, the treatment of the moments by the hook.
        steps_all: Whether all parameters are stepped, also those whose ``.grad`` is None.
        is_applied: Whether a step has applied the results of the last backward.
    """

    def __init__(self) -> None:
        self.updates: dict[Tensor, Tensor] = {}
        self.replaces = False
        self.means: dict[Tensor, Tensor | None] = {}
        self.moments: dict[Tensor, MomentStep] = {}
        self.steps_all = False
        self.is_applied = False
        self._versions: dict[Tensor, int] = {}

    def clear(self, joins: bool = False) -> None:
        """Remove all results: they have been applied, or a new backward replaces them.

        Args:
            joins: Whether the model is under ``join()``. Ranks without data do not know which
                parameters are unused on all ranks, so that every rank steps all parameters.
        """
        self.steps_all, self.is_applied = joins, False
        for results in (self.moments, self.updates, self.means, self._versions):
            results.clear()

    def deliver(self, updates: Mapping[Tensor, Tensor], replaces: bool = False) -> None:
        """Store the decoded result for the parameters of a bucket.

        Args:
            updates: By parameter, δ̃ or the new weights in its shape. The tensors must remain unchanged
                until the step.
            replaces: Whether they are new weights.
        """
        self.updates.update(updates)
        self.replaces = replaces

    def deliver_mean(self, parameter: Tensor, mean: Tensor | None = None) -> None:
        """Store that the next step of a parameter is AdamW on the mean gradient.

        Args:
            parameter: The parameter.
            mean: The mean gradient; None if ``parameter.grad`` will contain it.
        """
        self.means[parameter] = mean

    def withdraw(self, parameter: Tensor) -> None:
        """Remove the result for a parameter that no rank used.

        Args:
            parameter: The parameter.
        """
        self.updates.pop(parameter, None)
        self.moments.pop(parameter, None)

    def record_gradients(self) -> None:
        """Record the versions of all gradients at the end of backward, to detect later changes."""
        self._versions = {p: p.grad._version for p in self.updates if p.grad is not None}

    def check_gradients(self, parameters: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
        """Check that gradients are unchanged since the exchange.

        Args:
            parameters: Those of the optimizer.
            names: By parameter of the attached model.

        Raises:
            EffAdamError: If a gradient was changed or removed, or did not come through the exchange.
        """
        removed = []
        for parameter in parameters:
            if parameter.grad is not None:
                self._check_gradient(parameter, parameter.grad, names)
            elif parameter in self._versions:
                removed.append(parameter)
        if removed and len(removed) < len(self._versions):
            raise EffAdamError(
                f"The gradient of {names[removed[0]]!r} was set to None after the exchange, which has "
                "already changed its moments and residuals. To leave a parameter out of a step, call "
                "requires_grad_(False) on it before the forward, and wrap the model with "
                "find_unused_parameters=True; to leave out the whole step, do not call step()."
            )

    def _check_gradient(
        self, parameter: Tensor, gradient: Tensor, names: Mapping[Tensor, str]
    ) -> None:
        if parameter in self.updates:
            if self._versions.get(parameter, gradient._version) != gradient._version:
                raise EffAdamError(
                    f"The gradient of {names[parameter]!r} was changed after the exchange, as "
                    "clip_grad_norm_ does. In update mode it contains the finished update, and "
                    "changing it has no effect: use EfficientAdam(max_grad_norm=...) instead."
                )
        elif parameter in self.means:
            return
        elif parameter not in names:
            raise EffAdamError(
                f"A parameter of shape {tuple(parameter.shape)} has a gradient but is not part of "
                "the attached DDP model. Use a separate optimizer for it."
            )
        elif self.is_applied:
            raise EffAdamError(
                "step() was called twice after one backward, and the first call has applied the update "
                "of the exchange. Run a forward and backward before each step()."
            )
        else:
            raise EffAdamError(
                f"The gradient of {names[parameter]!r} did not come through the exchange: the last "
                "backward ran under no_sync(), or outside the DDP model. Let the last backward "
                "before step() synchronize."
            )
