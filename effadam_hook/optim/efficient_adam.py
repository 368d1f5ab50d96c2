"""EfficientAdam: Adam whose updates, not its gradients, are exchanged between the workers.

Every worker has moments of its own gradients. The communication hook turns a gradient into an update
inside the bucket, quantizes the update and averages it over the workers::

    in the hook    v_i ← β2 v_i + (1 - β2) g_i² ;  m_i ← β1 m_i + (1 - β1) g_i
                   u_i = α m_i / (√v_i + ε)
    in step()      x ← x - α λ x - δ̃ ,  where δ̃ is the twice quantized mean of the u_i

The learning rate is inside the quantizer: residuals are in units of the weights.

Each v_i contains the noise of one worker's gradient, while DDP with Adam has that of the mean gradient.
Steps are therefore up to √N smaller; without noise they are equal. ``second_moment`` selects a remedy:

- ``"local"``: none, as published. Multiply the learning rate by up to √N.
- ``"matched"``: steps are multiplied by a factor from 1 to √N for each parameter, and β1 by one for
  the quantizers, so that the learning rate and β1 of DDP with AdamW are suitable. Requires no
  communication; see :mod:`effadam_hook.optim.matching`.
- ``"shared"``: v is common to all workers. It follows the squared *mean* gradient, which is averaged
  uncompressed in the first ``refresh_every`` steps and in every ``refresh_every``-th step after them;
  in between, v is constant. All parameters of a bucket are refreshed together, as soon as one is due.
- ``"frozen"``: v is common, estimated during the dense steps of the warm-up, and constant afterwards,
  as in 1-bit Adam. A parameter that the warm-up did not use is estimated in its own first
  ``refresh_every`` steps.

A parameter is stepped if its ``.grad`` is not None, as in every optimizer of torch. The update itself
is delivered apart from ``.grad``, whose value only dense steps use. A parameter that no rank used
remains unchanged, with its moments, residuals and step count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from effadam_hook.errors import EffAdamError, StateMismatchError
from effadam_hook.feedback.moments import adopt_group, adopt_state
from effadam_hook.optim.recursion import AdamRecursion
from effadam_hook.optim.schedules import Schedule
from effadam_hook.optim.second_moment import SECOND_MOMENTS

__all__ = ["EfficientAdam"]

_OPTIONS = ("bias_correction", "second_moment", "refresh_every", "max_grad_norm", "schedule")


class EfficientAdam(Optimizer):
    """Adam whose updates the communication hook exchanges; requires :func:`effadam_hook.attach`.

    Args:
        params: The parameters of the DDP model, or groups of them.
        lr: Learning rate α. The hook reads it at every step, so that any scheduler works.
        betas: β1 and β2.
        eps: ε, added to √v with bias correction, and the initial value of v without.
        weight_decay: λ, decoupled as in AdamW.
        bias_correction: Whether to divide by ``1 - β1^t`` and ``1 - β2^t``.
        second_moment: ``"local"``, ``"matched"``, ``"shared"`` or ``"frozen"``, see the module.
        refresh_every: With ``"shared"``: number of steps from one uncompressed average of the gradient
            to the next. With ``"frozen"``: number of steps in which a parameter that the warm-up did
            not use estimates its second moment.
        max_grad_norm: Bound on the 2-norm of each worker's gradient over all parameters; of each node's
            mean gradient with topology "hierarchical". It delays the exchange until the end of
            backward, as no bucket can be sent before the norm is known. In dense steps it bounds the
            mean gradient.
        schedule: Replaces ``lr`` and β2 by step, see :mod:`effadam_hook.optim.schedules`.

    Attributes:
        recursion: The arithmetic and the pending results, for the communication hook.

    Raises:
        ValueError: If an option is out of its range.

    Examples:
        >>> optimizer = EfficientAdam(ddp_model.parameters(), lr=1e-3)
        >>> state = attach(ddp_model, optimizer=optimizer, quantizer="lloyd2")

    Source:
        Efficient-Adam, arXiv 2205.14473.
    """

    # A GradScaler then calls step(), which raises an error with the reason.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        second_moment: str = "local",
        refresh_every: int = 64,
        max_grad_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        _check_range("lr", lr, lr >= 0, "0 or more")
        for index, beta in enumerate(betas):
            _check_range(f"betas[{index}]", beta, 0 <= beta < 1, "at least 0 and below 1")
        _check_range("eps", eps, eps >= 0, "0 or more")
        _check_range("weight_decay", weight_decay, weight_decay >= 0, "0 or more")
        _check_range("refresh_every", refresh_every, refresh_every >= 1, "1 or more")
        if max_grad_norm is not None:
            _check_range("max_grad_norm", max_grad_norm, max_grad_norm > 0, "above 0, or None")
        if second_moment not in SECOND_MOMENTS:
            raise ValueError(
                f"Invalid second_moment: {second_moment!r}. Must be one of {', '.join(SECOND_MOMENTS)}."
            )
        if second_moment == "matched" and not bias_correction:
            raise ValueError(
                'Invalid bias_correction: False with second_moment="matched". Must be True: steps are '
                "matched to those of AdamW, which corrects the bias."
            )
        self.bias_correction = bias_correction
        self.second_moment = second_moment
        self.refresh_every = refresh_every
        self.max_grad_norm = max_grad_norm
        self.schedule = schedule
        self.recursion = AdamRecursion(self)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer.__getstate__ omits the attributes of subclasses.
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OPTIONS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "second_moment" in state:  # a copy; load_state_dict() calls this method, too
            self.recursion = AdamRecursion(self)
        super().__setstate__(state)

    def __repr__(self) -> str:
        options = "".join(f"    {name}: {getattr(self, name)}\n" for name in _OPTIONS)
        return f"{super().__repr__()[:-1]}All groups\n{options})"

    @classmethod
    def paper(cls, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> EfficientAdam:
        """Create the published recursion: no bias correction, v starts at ε, local second moments.

        Args:
            params: As for the class.
            lr: Learning rate α.
            **options: Further options of the class.

        Returns:
            The optimizer.
        """
        return cls(params, lr, bias_correction=False, second_moment="local", **options)

    @classmethod
    def one_bit_adam(cls, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> EfficientAdam:
        """Create the recipe of 1-bit Adam: a dense warm-up, then a frozen second moment.

        Attach it with ``quantizer="sign"`` and ``warmup_steps`` of about a fifth of the run.

        Args:
            params: As for the class.
            lr: Learning rate α.
            **options: Further options of the class.

        Returns:
            The optimizer.
        """
        return cls(params, lr, second_moment="frozen", **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the updates that the exchange has delivered.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            EffAdamError: If the optimizer is not attached, or if a gradient did not come through the
                exchange or was changed after it, as by gradient clipping.
        """
        if getattr(self, "found_inf", None) is not None:
            raise EffAdamError(
                "EfficientAdam was stepped by a GradScaler. Update mode sends finished updates, which "
                "cannot be unscaled: train in bfloat16, which needs no scaler, or in gradient mode."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.recursion.names is None:
            raise EffAdamError(
                "EfficientAdam is not attached to a DDP model, and its updates are made in the "
                "communication hook. Call effadam_hook.attach(ddp_model, optimizer=optimizer); a copy "
                "of an attached optimizer has to be attached itself."
            )
        self.recursion.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's optimizer.

        Moments differ between ranks, and with topology "hierarchical" those of a share are not enough
        to continue. The state of the hook has the moments of all ranks.

        Warns:
            UserWarning: If the moments are those of a share, and the state of the hook has not been
                saved since the last step.
        """
        self.recursion.warn_of_share()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of an EfficientAdam, or of torch's Adam or AdamW with its moments.

        Moments remain in float32 or float64, whatever the dtype of the parameters.

        Args:
            state_dict: The result of ``state_dict()``.

        Raises:
            StateMismatchError: If it is not such a state, requires options that EfficientAdam does not
                have (``amsgrad``, ``maximize``, coupled weight decay), or contains a value out of its
                range. The optimizer is then unchanged.
            ValueError: If it has other parameter groups.
        """
        adopted, states = self._adopted(state_dict)
        super().load_state_dict(adopted)
        own = [p for group in self.param_groups for p in group["params"]]
        for parameter, state in states.items():
            self.state[own[parameter]] = state
        self.recursion.replace_moments()

    def _adopted(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Convert a saved state, and its parameters' states by position; check every value."""
        if not isinstance(state_dict, Mapping) or not state_dict.keys() >= {
            "state",
            "param_groups",
        }:
            raise StateMismatchError(
                "This is no optimizer state. It must be the dictionary that state_dict() returns, with "
                "the keys state, param_groups."
            )
        adopted = dict(state_dict)
        adopted["param_groups"] = groups = [adopt_group(g) for g in state_dict["param_groups"]]
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [(key, group) for group in groups for key in group["params"]]
        states = {
            position: adopt_state(f"parameter {key}", state_dict["state"][key], parameter, group)
            for position, ((key, group), parameter) in enumerate(zip(saved, own, strict=False))
            if state_dict["state"].get(key)
        }
        return adopted, states


def _check_range(name: str, value: float, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"Invalid {name}: {value}. Must be {rule}.")
