"""The state of one parameter of update mode: its start, its copy for a checkpoint, and its return.

Its values are listed in :mod:`effadam_hook.feedback.moments`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effadam_hook.feedback.moments import MOMENTS
from effadam_hook.kernels.arguments import compute_dtype

__all__ = ["is_local", "load", "save", "start"]


def start(state: dict[str, Any], parameter: Tensor, second: float) -> None:
    """Fill the empty state of a parameter.

    Args:
        state: The state.
        parameter: The parameter. Its moments are float32 or float64.
        second: Value of the second moment.
    """
    first = torch.zeros_like(
        parameter, dtype=compute_dtype(parameter.dtype), memory_format=torch.contiguous_format
    )
    state["exp_avg"] = first
    state["exp_avg_sq"] = torch.full_like(first, second)
    state["step"] = 0
    # The product of all β2 so far. The bias correction of v divides by 1 minus this.
    state["decay"] = 1.0


def save(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the moments ``[numel]``, and plain numbers.

    Args:
        state: The state of the parameter.
    """
    saved = {**state, **{key: state[key].detach().flatten().clone() for key in MOMENTS}}
    if "signal" in state:
        saved["signal"] = float(state["signal"])
    return saved


def load(state: dict[str, Any], parameter: Tensor, saved: Mapping[str, Any]) -> None:
    """Replace the values of a state that has just started.

    Args:
        state: The state.
        parameter: The parameter.
        saved: The result of :func:`save`.
    """
    moments = {key: state[key] for key in MOMENTS}
    state.update(saved)
    if "signal" in state:
        signal, device = state["signal"], parameter.device
        state["signal"] = torch.as_tensor(signal, dtype=torch.float64, device=device).clone()
    if state["decay"] != 1:
        state.setdefault("refreshed", state["step"])
    for key, own in moments.items():
        if "start" in saved:
            state[key] = saved[key].to(own.device, own.dtype, copy=True)
        else:
            state[key] = own.copy_(saved[key].view_as(own))


def is_local(saved: Mapping[str, Any]) -> bool:
    """Return whether a saved state has made steps, none of which followed matched second moments.

    Args:
        saved: The result of :func:`save`.
    """
    return bool(saved["step"]) and "dense_mass" not in saved
