"""Wrappers around optimizers, such as those of Accelerate and Lightning."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["describe_kind", "unwrapped"]


def unwrapped(optimizer: Any, kinds: tuple[type[Optimizer], ...]) -> Any:
    """Return the optimizer of one of the given kinds inside wrappers.

    Args:
        optimizer: An optimizer, or an object that holds one as ``optimizer`` or ``_optimizer``.
        kinds: The accepted classes.

    Returns:
        The innermost optimizer of these classes, or ``optimizer`` itself if there is none.
    """
    inner, seen = optimizer, []
    while inner is not None and not isinstance(inner, kinds):
        seen.append(inner)
        held = (getattr(inner, name, None) for name in ("optimizer", "_optimizer"))
        inner = next((one for one in held if one is not None), None)
        if any(inner is one for one in seen):
            break
    return inner if isinstance(inner, kinds) else optimizer


def describe_kind(optimizer: Any) -> str:
    """Return the class of an optimizer, and of the one that it wraps, for messages."""
    held = getattr(optimizer, "optimizer", None)
    return type(optimizer).__name__ + (f" around {type(held).__name__}" if held is not None else "")
