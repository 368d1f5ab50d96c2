"""The Adam recursion of update mode: moments and weights of the parameters of one optimizer.

The communication hook advances the moments of a parameter inside its bucket, with the terms that
:meth:`AdamRecursion.prepare` returns. :meth:`AdamRecursion.step` then changes the weights and records
the step in the state of the parameter. Steps with a dense average run here as a whole.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effadam_hook.errors import EffAdamError
from effadam_hook.optim import moment_states
from effadam_hook.optim.matching import MatchedStep, Matching
from effadam_hook.optim.moment_parts import place, warn_of_share, widen
from effadam_hook.optim.pending import MomentStep, PendingStep
from effadam_hook.optim.second_moment import SecondMomentRule
from effadam_hook.wire.node_shares import NodeShare

if TYPE_CHECKING:
    from effadam_hook.optim.efficient_adam import EfficientAdam

__all__ = ["AdamRecursion"]

_FROZEN: dict[str, Any] = {"lr": 0.0, "betas": (0.0, 1.0), "eps": 1.0, "weight_decay": 0.0}
"""The group of a frozen parameter that is not in the optimizer: its update is zero."""


class AdamRecursion:
    """The arithmetic of an :class:`EfficientAdam`, as the attribute ``recursion`` of the optimizer.

    Hyperparameters, groups and states remain those of the optimizer, and are read at every use.

    Args:
        optimizer: The optimizer, which owns this object.

    Attributes:
        names: By parameter of the attached DDP model, its name; None before :meth:`attach_to`.
        pending: Results of the exchange for the next step.
        generation: Number of times that a loaded state has replaced the moments.
        share: This rank's share of the parameters, whose moments it advances; None for all of them.
        is_saved_by_hook: Whether a plugin saves the state of the hook in every checkpoint.
        matching: The correction of the steps; None without.
    """

    def __init__(self, optimizer: EfficientAdam) -> None:
        # Weakly: moments are freed with the last reference to the optimizer, without the collector.
        self._owner = weakref.ref(optimizer)
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self.names: dict[Tensor, str] | None = None
        self.pending = PendingStep()
        self.generation = 0
        self.share: NodeShare | None = None
        self.is_saved_by_hook = False
        self._saved_at: tuple[int, int] | None = None
        self.matching: Matching | None = None

    @property
    def _optimizer(self) -> EfficientAdam:
        optimizer = self._owner()
        assert optimizer is not None
        return optimizer

    @property
    def _second_moment(self) -> SecondMomentRule:
        return SecondMomentRule(self._optimizer.second_moment, self._optimizer.refresh_every)

    def attach_to(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Store the parameters that the hook exchanges; called by :func:`effadam_hook.attach`.

        Args:
            named_parameters: Those of the DDP model.

        Raises:
            EffAdamError: If a trainable parameter is not in the optimizer.
        """
        self.names = {tensor: name for name, tensor in named_parameters}
        for tensor in self.names:
            if tensor.requires_grad:
                self.group_of(tensor)

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the parameter group of a parameter.

        Args:
            parameter: The parameter.

        Returns:
            The group. A frozen parameter that is in no group has one with a zero update, since DDP
            exchanges parameters that were frozen after the model was wrapped.

        Raises:
            EffAdamError: If a trainable parameter is in no group.
        """
        if parameter not in self._groups:
            groups = self._optimizer.param_groups
            self._groups = {p: group for group in groups for p in group["params"]}
        if parameter not in self._groups and not parameter.requires_grad:
            return _FROZEN
        if parameter not in self._groups:
            raise EffAdamError(
                f"Parameter {self._name(parameter)!r} of the DDP model is not in the EfficientAdam "
                "optimizer. In update mode every trainable parameter must be: use "
                "ddp_model.parameters(), or add_param_group()."
            )
        return self._groups[parameter]

    def replace_moments(self) -> None:
        """Record that groups and states of the optimizer have been replaced."""
        self._groups = {}
        self.generation += 1

    # State of a parameter

    def init_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter, with zero moments if it has none.

        Args:
            parameter: The parameter.

        Returns:
            The state; its moments are float32 or float64.
        """
        optimizer = self._optimizer
        state: dict[str, Any] = optimizer.state[parameter]
        if "step" not in state:
            second = 0.0 if optimizer.bias_correction else float(self.group_of(parameter)["eps"])
            moment_states.start(state, parameter, second)
        return state

    def save_moments(self) -> dict[str, dict[str, Any]]:
        """Return this rank's moments and step counts. Moments differ between ranks.

        Returns:
            By parameter name: copies of the moments ``[numel]``, and plain numbers.
        """
        self._saved_at = self._stage()
        states = self._optimizer.state
        named = (self.names or {}).items()
        return {name: moment_states.save(states[p]) for p, name in named if p in states}

    def warn_of_share(self) -> None:
        """Warn if moments of a share are saved without the state of the hook; see the optimizer."""
        if not self.is_saved_by_hook and self._saved_at != self._stage():
            warn_of_share(self._optimizer.state.values(), self.share)

    def _stage(self) -> tuple[int, int]:
        """Return numbers that change with every step and every loaded state."""
        return self.generation, sum(s.get("step", 0) for s in self._optimizer.state.values())

    def load_moments(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace all moments and step counts by what :meth:`save_moments` returned.

        Args:
            saved: By parameter name. Parameters without an entry start with zero moments.
        """
        for parameter, name in (self.names or {}).items():
            self._optimizer.state.pop(parameter, None)
            if name in saved:
                moment_states.load(self.init_state(parameter), parameter, saved[name])
        self.generation += 1

    def place_moments(self, parameter: Tensor, flats: Mapping[str, Tensor]) -> None:
        """Move the moments of a parameter into a bucket's buffers; see :func:`moment_parts.place`."""
        place(self.init_state(parameter), parameter, self._name(parameter), flats, self.share)

    def widen_moments(self, parameter: Tensor) -> dict[str, Any]:
        """Make the moments of a parameter whole; see :func:`moment_parts.widen`.

        Returns:
            The state of the parameter.
        """
        state: dict[str, Any] = self._optimizer.state[parameter]
        widen(state, parameter, self._name(parameter), self.share)
        return state

    def _name(self, parameter: Tensor) -> str:
        return (self.names or {}).get(parameter, "")

    # Terms of a step

    def needs_mean(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether a step averages the gradient of a bucket densely before it makes updates.

        Args:
            parameters: The parameters of the bucket, each with a state. Step counts may differ between
                them.

        Returns:
            True if the second moment of any of them is due. Equal on all ranks, as step counts are.
        """
        rule = self._second_moment
        return rule.always_needs_mean or any(
            rule.needs_mean(self._optimizer.state[parameter]) for parameter in parameters
        )

    def prepare(self, parameter: Tensor, averaged: bool) -> tuple[float, ...]:
        """Return the terms with which the hook takes a step, and record them for :meth:`step`.

        Args:
            parameter: The parameter.
            averaged: Whether the gradient is the mean of all workers.

        Returns:
            See :meth:`terms`.
        """
        follows = self._second_moment.follows(self._optimizer.state[parameter], averaged)
        beta2 = self._beta2(parameter) if follows else 1.0
        beta1 = self._beta1(parameter)
        if self.matching is not None:
            beta1 = self.matching.beta1(beta1)
        self.pending.moments[parameter] = moment = MomentStep(beta1, beta2, follows)
        return self.terms(parameter, moment)

    def terms(self, parameter: Tensor, moment: MomentStep) -> tuple[float, ...]:
        """Return the numbers of the next step, in the order of :data:`kernels.fusions.ADAM_TERMS`.

        Args:
            parameter: The parameter.
            moment: β1 and β2 of this step; β2 = 1 keeps v constant.

        Returns:
            β1, 1-β1, β2, 1-β2, α / (1-β1^t), 1 / √(1-Πβ2), ε.
        """
        group, state = self.group_of(parameter), self._optimizer.state[parameter]
        beta1, beta2 = moment.beta1, moment.beta2
        alpha, step = self._alpha(parameter), state["step"] + 1
        if not self._optimizer.bias_correction:
            return (beta1, 1 - beta1, beta2, 1 - beta2, alpha, 1.0, 0.0)
        if self.matching is None:
            first_decay = beta1**step
        else:  # β1 of dense steps is another one
            first_decay = self.matching.first_decay(state, self._beta1(parameter)) * beta1
        seen = 1 - state["decay"] * beta2
        correction = 1 / math.sqrt(seen) if seen > 0 else 1.0
        return (
            *(beta1, 1 - beta1, beta2, 1 - beta2),
            *(alpha / (1 - first_decay), correction, group["eps"]),
        )

    def remaining_weight(self, parameter: Tensor) -> float:
        """Return the factor by which weight decay multiplies the weights in the next step: ``1 - α λ``.

        Args:
            parameter: The parameter.
        """
        return 1 - self._alpha(parameter) * float(self.group_of(parameter)["weight_decay"])

    def _alpha(self, parameter: Tensor) -> float:
        schedule = self._optimizer.schedule
        if schedule is not None:
            return schedule.alpha(self._optimizer.state[parameter]["step"] + 1)
        return float(self.group_of(parameter)["lr"])

    def _beta1(self, parameter: Tensor) -> float:
        return float(self.group_of(parameter)["betas"][0])

    def _beta2(self, parameter: Tensor) -> float:
        """Return β2 of a step in which v follows the gradient."""
        state, schedule = self._optimizer.state[parameter], self._optimizer.schedule
        if schedule is not None:
            beta2 = schedule.theta(state["step"] + 1)
        else:
            beta2 = float(self.group_of(parameter)["betas"][1])
        return self._second_moment.beta2(beta2, state)

    # Steps

    def withdraw(self, parameter: Tensor) -> None:
        """Remove the result for a parameter that no rank used, whose moments have been restored.

        Args:
            parameter: The parameter.
        """
        self.pending.withdraw(parameter)
        if not self._second_moment.is_local:
            state = self._optimizer.state[parameter]
            state["unused"] = state.get("unused", 0) + 1

    @torch.no_grad()
    def step(self) -> None:
        """Apply the pending results to the parameters that have a gradient.

        Raises:
            EffAdamError: If a gradient was changed or removed after the exchange, or did not come
                through it.
        """
        assert self.names is not None
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self.pending.check_gradients(parameters, self.names)
        steps_all = self.pending.steps_all
        self._apply_pending([p for p in parameters if p.grad is not None or steps_all])

    @torch.no_grad()
    def step_without_backward(self) -> None:
        """Apply the pending results on a rank that has run out of data under ``join()``.

        Its weights, moments and step counts remain equal to those of the other ranks.
        """
        pending = self.pending
        self._apply_pending([*pending.updates, *pending.means], uses_grad=False)

    def _apply_pending(self, parameters: Sequence[Tensor], uses_grad: bool = True) -> None:
        """Step the parameters that have a pending result, and remove all results."""
        pending = self.pending
        means = {}
        for parameter in parameters:
            if parameter in pending.means:
                # Not the recorded mean: the user may have clipped ``.grad``, as dense steps allow.
                gradient = parameter.grad if uses_grad else None
                gradient = pending.means[parameter] if gradient is None else gradient
                if gradient is not None:
                    means[parameter] = gradient
        if self._optimizer.max_grad_norm is not None and means:
            _clip(list(means.values()), self._optimizer.max_grad_norm)
        for parameter, gradient in means.items():
            self._step_dense(parameter, gradient)
        updated = [p for p in parameters if p in pending.updates]
        factors = self._match(updated)
        for parameter in updated:
            moment, factor = pending.moments[parameter], factors.get(parameter)
            self._apply(parameter, pending.updates[parameter], moment, factor)
        pending.clear()
        pending.is_applied = True

    def _match(self, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
        """Return the factors of the pending updates, by parameter."""
        if self.matching is None:
            return {}
        steps = []
        for parameter in parameters:
            state, moment = self._optimizer.state[parameter], self.pending.moments[parameter]
            self.matching.record(state, moment, self._beta1(parameter), dense=False)
            update, alpha = self.pending.updates[parameter], self._alpha(parameter)
            steps.append(MatchedStep(state, update, moment, alpha))
        return dict(zip(parameters, self.matching.factors(steps), strict=True))

    def _step_dense(self, parameter: Tensor, gradient: Tensor) -> None:
        """Step AdamW on the mean gradient."""
        state = self.init_state(parameter)
        moment = MomentStep(self._beta1(parameter), self._beta2(parameter), follows=True)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        gradient = gradient.to(first.dtype)
        beta1, rest1, beta2, rest2, size, correction, eps = self.terms(parameter, moment)
        first.mul_(beta1).add_(gradient, alpha=rest1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=rest2)
        update = first.mul(size).div_(second.sqrt().mul_(correction).add_(eps))
        if eps == 0:
            update = update.nan_to_num_(0.0)
        if self.matching is not None:
            self.matching.record(state, moment, self._beta1(parameter), dense=True)
        self._apply(parameter, update, moment)

    def _apply(
        self, parameter: Tensor, update: Tensor, moment: MomentStep, factor: Tensor | None = None
    ) -> None:
        """Change the weights, and record the step in the state."""
        state = self._optimizer.state[parameter]
        compressed = parameter in self.pending.updates
        if compressed and self.pending.replaces:
            parameter.copy_(update)
        else:
            if self.group_of(parameter)["weight_decay"] != 0:
                parameter.mul_(self.remaining_weight(parameter))
            if factor is None:
                parameter.sub_(update)
            else:
                parameter.addcmul_(update, factor, value=-1)
        late = self._optimizer.second_moment == "frozen" and "refreshed" not in state
        state["decay"] *= moment.beta2
        state["step"] += 1
        state.pop("unused", None)
        if moment.follows:
            state["refreshed"] = state["step"]
        if late and compressed:
            state["estimate_until"] = state["step"] + self._optimizer.refresh_every - 1


def _clip(gradients: Sequence[Tensor], bound: float) -> None:
    """Bound the 2-norm of all gradients together, in place, as ``clip_grad_norm_`` does."""
    norm = torch.stack([g.norm().to(gradients[0].device) for g in gradients]).norm()
    factor = (bound / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
