"""Moments and step counts of a parameter: checks, and conversion from torch's Adam.

The state of an :class:`~effadam_hook.optim.efficient_adam.EfficientAdam` contains, for every parameter,
the two moments of Adam and these plain values:

- ``step``: number of steps, as in Adam;
- ``decay``: product of all β2 used so far. The bias correction of the second moment divides by
  1 - ``decay``;
- ``refreshed``: last step that changed the second moment;
- ``start``: first element of the moments in the parameter, where they are a part of it, as in the
  hierarchical topology. They are then one-dimensional, with the elements in the order of DDP's bucket;
- ``signal``, ``signal_weight``: running means of w - κ/N and 1 - κ/N, whose ratio is ρ; see
  :mod:`effadam_hook.optim.matching`. Present with matched second moments only, as the following two;
- ``dense_mass``: weight of the dense steps in the second moment, at most 1 - ``decay``;
- ``first_decay``: product of all β1 used so far;
- ``estimate_until``, ``unused``: see :class:`~effadam_hook.optim.efficient_adam.EfficientAdam`; usually
  absent.

The state of ``torch.optim.AdamW`` contains the moments and ``step``. The other values follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effadam_hook.errors import StateMismatchError
from effadam_hook.kernels.arguments import compute_dtype

__all__ = ["ADAM_ONLY_OPTIONS", "MOMENTS", "adopt_group", "adopt_state", "check_moments"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of the moments in an optimizer state, as in :class:`torch.optim.Adam`."""

ADAM_ONLY_OPTIONS = frozenset(
    "amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay".split()
)
"""Options of a parameter group of ``torch.optim.Adam`` that EfficientAdam does not have."""

_COUNTS = ("step", "refreshed", "unused", "estimate_until", "start")
_SHARES = ("signal_weight", "dense_mass", "first_decay")
_KNOWN = frozenset((*MOMENTS, *_COUNTS, *_SHARES, "decay", "signal"))
_LARGEST_COUNT = 1 << 53  # up to here a float represents every integer


def check_moments(name: str, entry: Mapping[str, Any]) -> None:
    """Check all saved values of a parameter.

    Args:
        name: Name of the parameter, for messages.
        entry: Moments and plain values.

    Raises:
        StateMismatchError: If a value is missing, unknown, of the wrong type or out of its range.
    """
    for key in (*MOMENTS, "step", "decay"):
        if key not in entry:
            raise StateMismatchError(
                f"The saved moments of {name!r} lack {key!r}. Must have {', '.join(MOMENTS)}, step "
                "and decay: use another checkpoint."
            )
    unknown = sorted(map(str, entry.keys() - _KNOWN))
    if unknown:
        raise StateMismatchError(
            f"The saved moments of {name!r} have the unknown entries {', '.join(unknown)}. Must be "
            f"of {', '.join(sorted(_KNOWN))}: load a state that EfficientAdam wrote."
        )
    for key in _COUNTS:
        value = entry.get(key, 0)
        if type(value) is not int or not 0 <= value <= _LARGEST_COUNT:
            raise _invalid(key, name, value, "an integer of 0 or more")
    if entry.get("refreshed", 0) > entry["step"]:
        raise _invalid("refreshed", name, entry["refreshed"], f"at most step = {entry['step']}")
    for key in ("decay", *_SHARES):
        value = entry.get(key, 0)
        if type(value) not in (int, float) or not 0 <= value <= 1:  # NaN included
            raise _invalid(key, name, value, "a number from 0 to 1")
    signal = entry.get("signal", 0.0)
    if isinstance(signal, Tensor) and signal.numel() == 1:
        signal = signal.item()
    if type(signal) not in (int, float) or not math.isfinite(signal):
        raise _invalid("signal", name, signal, "a finite number")
    for key in MOMENTS:
        value = entry[key]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _invalid(key, name, value, "a floating tensor")
        if not bool(torch.isfinite(value).all()):
            raise _invalid(key, name, "NaN or infinite in places", "finite")
    if bool((entry["exp_avg_sq"] < 0).any()):
        least = float(entry["exp_avg_sq"].min())
        raise _invalid(
            "exp_avg_sq", name, f"{least:.3g} in places", "0 or more: it averages squares"
        )


def _invalid(key: str, name: str, value: object, rule: str) -> StateMismatchError:
    shown = value if isinstance(value, str) else repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return StateMismatchError(
        f"The saved {key} of {name!r} is {shown}. Must be {rule}. Use another checkpoint."
    )


def adopt_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a saved parameter group of EfficientAdam or of torch's Adam to one of EfficientAdam.

    Args:
        group: An entry of ``param_groups``.

    Returns:
        A copy with plain numbers, without the options that EfficientAdam does not have.

    Raises:
        StateMismatchError: If the group is that of another optimizer, or has an option that
            EfficientAdam does not support.
    """
    missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
    if missing:
        raise StateMismatchError(
            f"The saved optimizer state has no {', '.join(missing)} in a parameter group, which holds "
            f"{', '.join(sorted(map(str, group)))}. Must be the state of an EfficientAdam or of "
            "torch's Adam or AdamW: to come from another optimizer, load the weights only."
        )
    for option in ("amsgrad", "maximize"):
        if group.get(option):
            raise StateMismatchError(
                f"The saved optimizer state has {option}={group[option]!r}. Must be False: "
                f"EfficientAdam has no {option}. Load the weights only, or train without it first."
            )
    decoupled = group.get("decoupled_weight_decay", True)
    if not decoupled and float(group["weight_decay"]) != 0:
        raise StateMismatchError(
            f"The saved optimizer state is one of torch.optim.Adam with weight_decay="
            f"{group['weight_decay']}, added to the gradient. Must be decoupled, as in AdamW: set "
            "state_dict['param_groups'][i]['weight_decay'] = 0 before loading, and choose a decoupled "
            "one afterwards."
        )
    adopted = {key: value for key, value in group.items() if key not in ADAM_ONLY_OPTIONS}
    betas = adopted["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise _invalid("betas", "a parameter group", betas, "a pair of numbers")
    numbers = {key: adopted[key] for key in ("lr", "eps", "weight_decay")}
    numbers |= {f"betas[{index}]": beta for index, beta in enumerate(betas)}
    for key, value in numbers.items():
        numbers[key] = _number(key, value)
    adopted |= {key: numbers[key] for key in ("lr", "eps", "weight_decay")}
    adopted["betas"] = numbers["betas[0]"], numbers["betas[1]"]
    return adopted


def _number(key: str, value: Any) -> float:
    """Return a hyperparameter as a plain number; capturable optimizers store some in tensors."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if not good or not math.isfinite(value) or (key.startswith("betas") and value >= 1):
        rule = "at least 0 and below 1" if key.startswith("betas") else "a finite number, 0 or more"
        raise _invalid(key, "a parameter group", value, rule)
    return float(value)


def adopt_state(
    name: str, entry: Any, parameter: Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert the saved state of a parameter of EfficientAdam or of torch's Adam.

    Args:
        name: Name of the parameter, for messages.
        entry: Saved state of the parameter.
        parameter: The parameter.
        group: Parameter group, as :func:`adopt_group` returns it.

    Returns:
        A copy that satisfies :func:`check_moments`, with moments in float32 or float64.

    Raises:
        StateMismatchError: If it is not the state of such an optimizer, or has another shape.
    """
    if not isinstance(entry, Mapping) or not entry.keys() >= {*MOMENTS, "step"}:
        held = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise StateMismatchError(
            f"The saved optimizer state of {name} holds {held or 'nothing'}. Must hold "
            f"{', '.join(MOMENTS)} and step, as that of an EfficientAdam or of torch's Adam or AdamW "
            "does: to come from another optimizer, load the weights only."
        )
    if "max_exp_avg_sq" in entry:
        raise StateMismatchError(
            f"The saved optimizer state of {name} holds max_exp_avg_sq, that of amsgrad=True. "
            "EfficientAdam has no amsgrad. Load the weights only, or train without it first."
        )
    adopted = dict(entry)
    adopted["step"] = step = _count(name, entry["step"])
    if "decay" not in adopted:
        adopted["decay"] = float(group["betas"][1]) ** step
        adopted["dense_mass"] = 1 - adopted["decay"]  # the second moment of DDP
    if "refreshed" not in adopted and adopted["decay"] != 1:
        adopted["refreshed"] = step
    check_moments(name, adopted)
    if "signal" in adopted:
        signal, device = adopted["signal"], parameter.device
        adopted["signal"] = torch.as_tensor(signal, dtype=torch.float64, device=device).clone()
    precise = compute_dtype(parameter.dtype)
    for key in MOMENTS:
        value = adopted[key]
        if "start" in adopted:
            end = adopted["start"] + value.numel()
            if value.ndim != 1 or end > parameter.numel():
                raise _invalid(
                    f"shape of {key}",
                    name,
                    f"{tuple(value.shape)} from element {adopted['start']} on",
                    f"a part of its {parameter.numel()} elements",
                )
        elif value.shape != parameter.shape:
            raise _invalid(
                f"shape of {key}", name, tuple(value.shape), f"{tuple(parameter.shape)}, its own"
            )
        adopted[key] = value.detach().to(parameter.device, precise, copy=True)
    return adopted


def _count(name: str, step: Any) -> int:
    """Return a number of steps as an integer; torch's Adam stores it as a float tensor."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not whole or not 0 <= value <= _LARGEST_COUNT or value != int(value):  # NaN included
        raise _invalid("step", name, step, "a whole number of 0 or more")
    return int(value)
