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
  rests.
- ``"frozen"``: v is common, estimated during the warm-up's dense steps and never changed again, as in
  1-bit Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effadam_hook.errors import EffAdamError
from effadam_hook.schedules import Schedule

__all__ = ["SECOND_MOMENTS", "EfficientAdam"]

SECOND_MOMENTS = ("local", "shared", "frozen")
"""Whose gradients a worker's second moment follows."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of an optimizer state's moments, as in :class:`torch.optim.Adam`."""


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
        schedule: Overrides ``lr`` and β2 by step, see :mod:`effadam_hook.schedules`.

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
        self._attached: dict[Tensor, str] | None = None
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._updates: dict[Tensor, Tensor | None] = {}
        self._averaged: set[Tensor] = set()
        self._replaces = False
        self._versions: dict[Tensor, int] = {}
        self.generation = 0
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

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

    def refreshes(self, step: int) -> bool:
        """Whether a step averages the gradient to refresh a shared second moment.

        Args:
            step: The step that is being taken, from 1.

        Returns:
            With ``second_moment="shared"`` True for the first ``refresh_every`` steps, since a second
            moment of few gradients makes wild steps, and then every ``refresh_every``-th.
        """
        due = step <= self.refresh_every or (step - 1) % self.refresh_every == 0
        return self.second_moment == "shared" and due

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

    def terms(self, parameter: Tensor, name: str, dense: bool) -> tuple[float, ...]:
        """The numbers of the step that is being taken, as the kernels want them.

        Args:
            parameter: The parameter.
            name: Its name, for messages.
            dense: Whether the gradient is the mean of all workers'.

        Returns:
            β1, 1-β1, β2, 1-β2, α / (1-β1^t), 1 / √(1-Πβ2), ε.
        """
        group, state = self.group_of(parameter, name), self.state[parameter]
        beta1, beta2 = group["betas"][0], self._beta2(group, state, dense)
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

    def _beta2(self, group: dict[str, Any], state: dict[str, Any], dense: bool) -> float:
        """β2 of this step; 1 leaves v as it is."""
        if self.second_moment != "local" and not dense:
            return 1.0
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

    def deliver(self, parameter: Tensor, update: Tensor | None, replaces: bool = False) -> None:
        """Take the common result for a parameter, for the next :meth:`step`.

        Args:
            parameter: The parameter.
            update: δ̃ or the new weights, in the parameter's shape and the arithmetic's dtype; None if
                δ̃ will be in ``parameter.grad``.
            replaces: Whether it is the new weights.
        """
        self._updates[parameter] = update
        self._replaces = replaces

    def deliver_mean(self, parameter: Tensor) -> None:
        """Note that ``parameter.grad`` will be the mean gradient: the next step is plain AdamW.

        Args:
            parameter: The parameter.
        """
        self._averaged.add(parameter)

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
                "communication hook. Call effadam_hook.attach(ddp_model, optimizer=optimizer)."
            )
        averaged = [
            p for group in self.param_groups for p in group["params"] if self._takes_mean(p)
        ]
        if self.max_grad_norm is not None and averaged:
            torch.nn.utils.clip_grad_norm_(averaged, self.max_grad_norm)
        for parameter in averaged:
            self._step_dense(parameter)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._updates and parameter.grad is not None:
                    update = self._updates[parameter]
                    self._apply(
                        parameter, parameter.grad if update is None else update, dense=False
                    )
        self._updates.clear()
        self._averaged.clear()
        self._versions.clear()
        return loss

    def _takes_mean(self, parameter: Tensor) -> bool:
        """Whether this step is a dense one; raises if the gradient is not the hook's."""
        if parameter.grad is None:
            return False
        assert self._attached is not None
        if parameter in self._updates:
            if self._versions.get(parameter, parameter.grad._version) != parameter.grad._version:
                raise EffAdamError(
                    f"The gradient of {self._attached[parameter]!r} was changed after the exchange, "
                    "as clip_grad_norm_ does. In update mode it holds the finished update, and "
                    "changing it has no effect: use EfficientAdam(max_grad_norm=...) instead."
                )
            return False
        if parameter in self._averaged:
            return True
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

    def _step_dense(self, parameter: Tensor) -> None:
        """Plain AdamW on the mean gradient."""
        assert self._attached is not None and parameter.grad is not None
        name = self._attached[parameter]
        state = self.init_state(parameter, name)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        gradient = parameter.grad.to(first.dtype)
        beta1, rest1, beta2, rest2, size, correction, eps = self.terms(parameter, name, dense=True)
        first.mul_(beta1).add_(gradient, alpha=rest1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=rest2)
        update = first.mul(size).div_(second.sqrt().mul_(correction).add_(eps))
        self._apply(parameter, update.nan_to_num_(0.0) if eps == 0 else update, dense=True)

    def _apply(self, parameter: Tensor, update: Tensor, dense: bool) -> None:
        assert self._attached is not None
        name = self._attached[parameter]
        group, state = self.group_of(parameter, name), self.state[parameter]
        refreshed = dense or self.refreshes(state["step"] + 1)
        if self._replaces and not dense:
            parameter.copy_(update)
        else:
            if group["weight_decay"] != 0:
                parameter.mul_(self.keeps(parameter, name))
            parameter.sub_(update)
        state["decay"] *= self._beta2(group, state, refreshed)
        state["step"] += 1
        if refreshed:
            state["refreshed"] = state["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping moments in their own dtype whatever the parameters'.

        Args:
            state_dict: What ``state_dict()`` returned.
        """
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(saved, own, strict=True):
            for moment in MOMENTS:
                if moment in state_dict["state"].get(key, {}):
                    value = state_dict["state"][key][moment]
                    self.state[parameter][moment] = value.to(parameter.device, copy=True)
        self._groups = {}
        self.generation += 1


def _check_range(name: str, value: float, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"Invalid {name}: {value}. Must be {rule}.")
