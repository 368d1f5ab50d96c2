"""EfficientAdam: Adam whose update, not whose gradient, travels between the workers.

Every worker keeps moments of its own gradients, and the communication hook turns them into an update
inside the bucket, quantizes that and averages it::

    in the hook    v_i ← β2 v_i + (1 - β2) g_i² ;  m_i ← β1 m_i + (1 - β1) g_i
                   u_i = α m_i / (√v_i + ε)
    in step()      x ← x - α λ x - δ̃ ,  where δ̃ is the twice quantized mean of the u_i

The learning rate is inside the quantizer: what error feedback keeps is in units of the weights.

Each v_i has the noise of one worker's gradient where DDP with Adam has that of the mean, so steps are
up to √N smaller (with no noise, equal). ``second_moment`` says what to do about it:

- ``"local"``: nothing, as published. Multiply the learning rate, by up to √N.
- ``"shared"``: v is common to all workers. It follows the squared *mean* gradient, which is averaged
  uncompressed in the first ``refresh_every`` steps and then every ``refresh_every``-th; in between, v
  rests. All parameters of a bucket are refreshed together, as soon as one of them is due.
- ``"frozen"``: v is common, estimated during the warm-up's dense steps and never changed again, as in
  1-bit Adam. A parameter that the warm-up did not use is estimated in its own first ``refresh_every``
  steps.

A parameter is stepped if its ``.grad`` is not None, as in every optimizer of torch. Nothing else about
``.grad`` matters: the update itself is kept here. A parameter that no rank used stays as it was, with
its moments, residuals and step count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from effadam_hook.errors import EffAdamError, StateMismatchError
from effadam_hook.feedback.moments import MOMENTS, adopt_group, adopt_state
from effadam_hook.optim.schedules import Schedule

__all__ = ["SECOND_MOMENTS", "EfficientAdam", "unwrapped"]

SECOND_MOMENTS = ("local", "shared", "frozen")
"""Whose gradients a worker's second moment follows."""

_AWAKE = 64
"""Backward passes without use after which a parameter asks for no more averages, at least."""


class _Taken(NamedTuple):
    """How the hook has taken a parameter's step, for the books that :meth:`EfficientAdam.step` keeps.

    Attributes:
        beta2: The weight of the second moment; 1 where it rests.
        estimates: Whether the second moment follows the gradient.
    """

    beta2: float
    estimates: bool


_FROZEN: dict[str, Any] = {"lr": 0.0, "betas": (0.0, 1.0), "eps": 1.0, "weight_decay": 0.0}
"""The group of a frozen parameter that the optimizer lacks: its update is zero."""


class EfficientAdam(Optimizer):
    """Adam with updates exchanged by the communication hook; needs :func:`effadam_hook.attach`.

    Args:
        params: The parameters of the DDP model, or groups of them.
        lr: Learning rate α, read when the hook runs, so any scheduler works.
        betas: β1 and β2.
        eps: ε, added to √v with bias correction, and v's initial value without.
        weight_decay: λ, decoupled as in AdamW.
        bias_correction: Whether to divide by ``1 - β1^t`` and ``1 - β2^t``.
        second_moment: ``"local"``, ``"shared"`` or ``"frozen"``, see the module.
        refresh_every: With ``"shared"``: steps from one uncompressed average of the gradient to the
            next.
        max_grad_norm: Bound on the 2-norm of each worker's gradient over all parameters. It delays
            the exchange until backward is through, since no bucket can be sent before the norm is
            known. During dense steps it bounds the mean gradient.
        schedule: Overrides ``lr`` and β2 by step, see :mod:`effadam_hook.optim.schedules`.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> optimizer = EfficientAdam(ddp_model.parameters(), lr=1e-3)
        >>> state = attach(ddp_model, optimizer=optimizer, quantizer="lloyd2")

    Source:
        Efficient-Adam, arXiv 2205.14473.
    """

    # Makes a GradScaler call step() itself, which then says why that cannot work.
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
                f"Invalid second_moment: {second_moment!r}. "
                f"Must be one of {', '.join(SECOND_MOMENTS)}."
            )
        self.bias_correction = bias_correction
        self.second_moment = second_moment
        self.refresh_every = refresh_every
        self.max_grad_norm = max_grad_norm
        self.schedule = schedule
        self._detach()
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _detach(self) -> None:
        self._attached: dict[Tensor, str] | None = None
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._taken: dict[Tensor, _Taken] = {}
        self._updates: dict[Tensor, Tensor] = {}
        # The mean gradients, where they are not to be taken from ``.grad``.
        self._averaged: dict[Tensor, Tensor | None] = {}
        self._replaces = False
        self._regardless = False
        self._versions: dict[Tensor, int] = {}
        self.generation = 0

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own drops the attributes of subclasses.
        options = ("bias_correction", "second_moment", "refresh_every", "max_grad_norm", "schedule")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "second_moment" in state:  # a copy; load_state_dict() calls this, too
            self._detach()
        super().__setstate__(state)

    @classmethod
    def paper(cls, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> EfficientAdam:
        """The published recursion: no bias correction, v starts at ε, local second moments.

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
        """The recipe of 1-bit Adam: dense warm-up, then a frozen second moment.

        Attach it with ``quantizer="sign"`` and ``warmup_steps`` of about a fifth of the run.

        Args:
            params: As for the class.
            lr: Learning rate α.
            **options: Further options of the class.

        Returns:
            The optimizer.
        """
        return cls(params, lr, second_moment="frozen", **options)

    # What the exchange needs

    def attach_to(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Note which parameters the hook will see; done by :func:`effadam_hook.attach`.

        Args:
            named_parameters: Those of the DDP model.

        Raises:
            EffAdamError: If one that needs a gradient is not in this optimizer.
        """
        self._attached = {tensor: name for name, tensor in named_parameters}
        for tensor, name in self._attached.items():
            if tensor.requires_grad:
                self.group_of(tensor, name)

    def group_of(self, parameter: Tensor, name: str) -> dict[str, Any]:
        """The parameter group of a parameter.

        Args:
            parameter: The parameter.
            name: Its name, for the message.

        Returns:
            The group.

        Raises:
            EffAdamError: If there is none.
        """
        if parameter not in self._groups:
            self._groups = {p: group for group in self.param_groups for p in group["params"]}
        if parameter not in self._groups and not parameter.requires_grad:
            return _FROZEN  # DDP still exchanges what was frozen after it had been built
        if parameter not in self._groups:
            raise EffAdamError(
                f"Parameter {name!r} of the DDP model is not in the EfficientAdam optimizer. In "
                "update mode every trainable parameter must be: use ddp_model.parameters(), or "
                "add_param_group()."
            )
        return self._groups[parameter]

    def averages(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a step averages the gradient of a bucket densely before it makes updates.

        Args:
            parameters: Those of the bucket, with a state each. They may be at different steps.

        Returns:
            Whether the second moment of any of them is due. The same on every rank, as step counts are.
        """
        if self.second_moment == "shared" and self.refresh_every == 1:
            return True
        return any(self._is_due(self.state[parameter]) for parameter in parameters)

    def _is_due(self, state: Mapping[str, Any]) -> bool:
        """Whether a parameter asks for the mean gradient, for its second moment."""
        # Or one that is never used would have its bucket averaged for ever.
        if state.get("unused", 0) >= max(_AWAKE, self.refresh_every):
            return False
        step = state["step"] + 1
        if self.second_moment == "shared":
            # A second moment of few gradients makes wild steps.
            return bool(step <= self.refresh_every or (step - 1) % self.refresh_every == 0)
        if self.second_moment == "frozen":
            return "refreshed" not in state or step <= state.get("estimate_until", 0)
        return False

    def _estimates(self, state: Mapping[str, Any], averaged: bool) -> bool:
        """Whether the second moment follows the gradient in a step."""
        if self.second_moment == "local" or "refreshed" not in state:
            return True
        if self.second_moment == "shared":
            return averaged
        return averaged and state["step"] < state.get("estimate_until", 0)

    def init_state(self, parameter: Tensor, name: str) -> dict[str, Any]:
        """The state of a parameter, made if it has none: zero moments in float32 or float64."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            precise = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            first = torch.zeros_like(
                parameter, dtype=precise, memory_format=torch.contiguous_format
            )
            start = 0.0 if self.bias_correction else float(self.group_of(parameter, name)["eps"])
            state["exp_avg"] = first
            state["exp_avg_sq"] = torch.full_like(first, start)
            state["step"] = 0
            # Product of the β2 so far: what the bias correction of v divides by is 1 minus this.
            state["decay"] = 1.0
        return state

    def prepare(self, parameter: Tensor, name: str, averaged: bool) -> tuple[float, ...]:
        """Settle how the hook takes a step, and remember it for :meth:`step`.

        Args:
            parameter: The parameter.
            name: Its name, for messages.
            averaged: Whether the gradient is the mean of all workers'.

        Returns:
            See :meth:`terms`.
        """
        state = self.state[parameter]
        estimates = self._estimates(state, averaged)
        beta2 = self._beta2(self.group_of(parameter, name), state) if estimates else 1.0
        self._taken[parameter] = _Taken(beta2, estimates)
        return self.terms(parameter, name, beta2)

    def terms(self, parameter: Tensor, name: str, beta2: float) -> tuple[float, ...]:
        """The numbers of the step that is being taken, as the kernels want them.

        Args:
            parameter: The parameter.
            name: Its name, for messages.
            beta2: β2 of this step; 1 leaves v as it is.

        Returns:
            β1, 1-β1, β2, 1-β2, α / (1-β1^t), 1 / √(1-Πβ2), ε.
        """
        group, state = self.group_of(parameter, name), self.state[parameter]
        beta1 = group["betas"][0]
        alpha, step = self._alpha(group, state), state["step"] + 1
        if not self.bias_correction:
            return (beta1, 1 - beta1, beta2, 1 - beta2, alpha, 1.0, 0.0)
        seen = 1 - state["decay"] * beta2
        correction = 1 / math.sqrt(seen) if seen > 0 else 1.0
        return (
            *(beta1, 1 - beta1, beta2, 1 - beta2),
            *(alpha / (1 - beta1**step), correction, group["eps"]),
        )

    def _alpha(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        if self.schedule is not None:
            return self.schedule.alpha(state["step"] + 1)
        return float(group["lr"])

    def _beta2(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        """β2 of a step in which v follows the gradient."""
        step = state["step"] + 1
        beta2 = float(group["betas"][1])
        if self.schedule is not None:
            beta2 = self.schedule.theta(step)
        if self.second_moment == "shared":
            # Since the last mean gradient, v has rested for this many steps.
            beta2 **= step - state.get("refreshed", step - 1)
        return beta2

    def keeps(self, parameter: Tensor, name: str) -> float:
        """What decoupled weight decay leaves of a weight in the step that is being taken.

        Args:
            parameter: The parameter.
            name: Its name, for messages.

        Returns:
            ``1 - α λ``.
        """
        group = self.group_of(parameter, name)
        return 1 - self._alpha(group, self.state[parameter]) * float(group["weight_decay"])

    def begin_backward(self, joins: bool) -> None:
        """Forget what an earlier backward has delivered; called when a backward's first bucket comes.

        Args:
            joins: Whether the model is under ``join()``: ranks out of data cannot know which parameters
                nobody used, so all are stepped on every rank, whatever ``.grad`` is.
        """
        self._regardless = joins
        self._taken.clear()
        self._updates.clear()
        self._averaged.clear()
        self._versions.clear()

    def deliver(self, updates: Mapping[Tensor, Tensor], replaces: bool = False) -> None:
        """Take the common result for the parameters of a bucket, for the next :meth:`step`.

        Args:
            updates: By parameter, δ̃ or the new weights in its shape, kept as they are until then.
            replaces: Whether it is the new weights.
        """
        self._updates.update(updates)
        self._replaces = replaces

    def withdraw(self, parameter: Tensor) -> None:
        """Drop the result for a parameter that no rank used, whose moments have been put back.

        Args:
            parameter: The parameter.
        """
        self._updates.pop(parameter, None)
        self._taken.pop(parameter, None)
        if self.second_moment != "local":
            state = self.state[parameter]
            state["unused"] = state.get("unused", 0) + 1

    def deliver_mean(self, parameter: Tensor, mean: Tensor | None = None) -> None:
        """Note that the next step is plain AdamW on the mean gradient.

        Args:
            parameter: The parameter.
            mean: The mean gradient; None if it will be in ``parameter.grad``, or nowhere.
        """
        self._averaged[parameter] = mean

    def note_gradients(self) -> None:
        """Remember the gradients as the exchange left them, to notice if someone changes them."""
        self._versions = {p: p.grad._version for p in self._updates if p.grad is not None}

    def save_moments(self) -> dict[str, dict[str, Any]]:
        """This rank's moments and step counts: ranks differ in them, so one rank's do not serve all.

        Returns:
            By parameter name: copies of the moments ``[numel]``, and plain numbers.
        """
        saved = {}
        for parameter, name in (self._attached or {}).items():
            if parameter in self.state:
                state = self.state[parameter]
                moments = {key: state[key].detach().flatten().clone() for key in MOMENTS}
                saved[name] = {**state, **moments}
        return saved

    def load_moments(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what :meth:`save_moments` returned.

        Args:
            saved: By parameter name; parameters not named start anew.
        """
        for parameter, name in (self._attached or {}).items():
            self.state.pop(parameter, None)
            if name in saved:
                state = self.init_state(parameter, name)
                moments = {key: state[key] for key in MOMENTS}
                state.update(saved[name])
                if state["decay"] != 1:
                    state.setdefault("refreshed", state["step"])
                for key, own in moments.items():
                    state[key] = own.copy_(saved[name][key].view_as(own))
        self.generation += 1

    # What the training loop needs

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply what the exchange delivered.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            EffAdamError: If the optimizer is not attached, a gradient did not come through the
                exchange, or one was changed after it, as gradient clipping does.
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
        if self._attached is None:
            raise EffAdamError(
                "EfficientAdam is not attached to a DDP model, and its updates are made in the "
                "communication hook. Call effadam_hook.attach(ddp_model, optimizer=optimizer); a copy "
                "of an attached optimizer has to be attached itself."
            )
        self._check_gradients()
        self._apply_delivered(
            [
                parameter
                for group in self.param_groups
                for parameter in group["params"]
                if parameter.grad is not None or self._regardless
            ]
        )
        return loss

    @torch.no_grad()
    def step_without_backward(self) -> None:
        """Apply what the exchange delivered on a rank that has run out of data under ``join()``.

        Its weights, moments and step counts then stay those of the other ranks.
        """
        self._apply_delivered(list(self._updates) + list(self._averaged), trusts_grad=False)

    def _apply_delivered(self, parameters: Sequence[Tensor], trusts_grad: bool = True) -> None:
        """Step the parameters for which something was delivered, and forget it."""
        means = {}
        for parameter in parameters:
            if parameter in self._averaged:
                # The user may have clipped ``.grad``, which is allowed in dense steps.
                gradient = parameter.grad if trusts_grad else None
                gradient = self._averaged[parameter] if gradient is None else gradient
                if gradient is not None:
                    means[parameter] = gradient
        if self.max_grad_norm is not None and means:
            _clip(list(means.values()), self.max_grad_norm)
        for parameter, gradient in means.items():
            self._step_dense(parameter, gradient)
        for parameter in parameters:
            if parameter in self._updates:
                taken = self._taken[parameter]
                self._apply(parameter, self._updates[parameter], taken, self._replaces)
        self.begin_backward(joins=False)

    def _check_gradients(self) -> None:
        """Raise if a gradient is not what the hook and DDP have left."""
        assert self._attached is not None
        removed = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._check_gradient(parameter)
                elif parameter in self._versions:
                    removed.append(parameter)
        if removed and len(removed) < len(self._versions):
            raise EffAdamError(
                f"The gradient of {self._attached[removed[0]]!r} was set to None after the exchange, "
                "which has moved its moments and residuals already. To leave a parameter out of a "
                "step, call requires_grad_(False) on it before the forward, and wrap the model with "
                "find_unused_parameters=True; to leave out the whole step, do not call step()."
            )

    def _check_gradient(self, parameter: Tensor) -> None:
        assert self._attached is not None and parameter.grad is not None
        if parameter in self._updates:
            if self._versions.get(parameter, parameter.grad._version) != parameter.grad._version:
                raise EffAdamError(
                    f"The gradient of {self._attached[parameter]!r} was changed after the exchange, "
                    "as clip_grad_norm_ does. In update mode it holds the finished update, and "
                    "changing it has no effect: use EfficientAdam(max_grad_norm=...) instead."
                )
            return
        if parameter in self._averaged:
            return
        if parameter not in self._attached:
            raise EffAdamError(
                f"A parameter of shape {tuple(parameter.shape)} has a gradient but is not part of "
                "the attached DDP model. Give it an optimizer of its own."
            )
        raise EffAdamError(
            f"The gradient of {self._attached[parameter]!r} did not come through the exchange: the "
            "last backward ran under no_sync(), or outside the DDP model. Let the last backward "
            "before step() synchronize."
        )

    def _step_dense(self, parameter: Tensor, gradient: Tensor) -> None:
        """Plain AdamW on the mean gradient."""
        assert self._attached is not None
        name = self._attached[parameter]
        state = self.init_state(parameter, name)
        taken = _Taken(self._beta2(self.group_of(parameter, name), state), estimates=True)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        gradient = gradient.to(first.dtype)
        beta1, rest1, beta2, rest2, size, correction, eps = self.terms(parameter, name, taken.beta2)
        first.mul_(beta1).add_(gradient, alpha=rest1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=rest2)
        update = first.mul(size).div_(second.sqrt().mul_(correction).add_(eps))
        if eps == 0:
            update = update.nan_to_num_(0.0)
        self._apply(parameter, update, taken, replaces=False)

    def _apply(self, parameter: Tensor, update: Tensor, taken: _Taken, replaces: bool) -> None:
        """Change the weights, and keep the books of what was done."""
        assert self._attached is not None
        name = self._attached[parameter]
        group, state = self.group_of(parameter, name), self.state[parameter]
        if replaces:
            parameter.copy_(update)
        else:
            if group["weight_decay"] != 0:
                parameter.mul_(self.keeps(parameter, name))
            parameter.sub_(update)
        late = self.second_moment == "frozen" and "refreshed" not in state
        state["decay"] *= taken.beta2
        state["step"] += 1
        state.pop("unused", None)
        if taken.estimates:
            state["refreshed"] = state["step"]
        if late and parameter in self._updates:
            state["estimate_until"] = state["step"] + self.refresh_every - 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of an EfficientAdam, or of torch's Adam or AdamW, whose moments are taken over.

        Moments keep their own dtype, whatever the parameters'.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            StateMismatchError: If it is not such a state, asks for what EfficientAdam does not do
                (``amsgrad``, ``maximize``, coupled weight decay), or has a value out of its range.
                Nothing has changed then.
            ValueError: If it has other parameter groups.
        """
        adopted, states = self._adopted(state_dict)
        super().load_state_dict(adopted)
        own = [p for group in self.param_groups for p in group["params"]]
        for parameter, state in states.items():
            self.state[own[parameter]] = state
        self._groups = {}
        self.generation += 1

    def _adopted(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """A saved state as one of ours, and its parameters' states by position; all checked."""
        if not isinstance(state_dict, Mapping) or not state_dict.keys() >= {
            "state",
            "param_groups",
        }:
            raise StateMismatchError(
                "This is no optimizer state: it must be the dictionary that state_dict() returns, "
                "with the keys state, param_groups."
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


def unwrapped(optimizer: Any, kinds: tuple[type[Optimizer], ...]) -> Any:
    """The optimizer of one of the given kinds inside wrappers, such as Accelerate's or Lightning's.

    Args:
        optimizer: An optimizer, or what holds one as ``optimizer`` or ``_optimizer``.
        kinds: The kinds that are looked for.

    Returns:
        That optimizer, or ``optimizer`` itself where there is none inside.
    """
    inner, seen = optimizer, []
    while inner is not None and not isinstance(inner, kinds):
        seen.append(inner)
        held = (getattr(inner, name, None) for name in ("optimizer", "_optimizer"))
        inner = next((one for one in held if one is not None), None)
        if any(inner is one for one in seen):
            break
    return inner if isinstance(inner, kinds) else optimizer


def _clip(gradients: Sequence[Tensor], bound: float) -> None:
    """Bound the 2-norm of all gradients together, in place, as ``clip_grad_norm_`` does."""
    norm = torch.stack([g.norm().to(gradients[0].device) for g in gradients]).norm()
    factor = (bound / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))


def _check_range(name: str, value: float, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"Invalid {name}: {value}. Must be {rule}.")
