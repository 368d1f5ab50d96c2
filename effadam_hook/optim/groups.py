"""Settings of an optimizer's parameter groups, as text that ranks can compare."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["group_settings"]


def group_settings(optimizer: Optimizer) -> dict[str, dict[str, str]]:
    """Return the settings of all parameter groups.

    Args:
        optimizer: Any optimizer.

    Returns:
        By group, ``"group 0"`` and so on: the settings by name, without the parameters.
    """
    return {
        f"group {index}": {name: _text(value) for name, value in group.items() if name != "params"}
        for index, group in enumerate(optimizer.param_groups)
    }


def _text(value: Any) -> str:
    return str(float(value) if isinstance(value, Tensor) else value)
