"""Gradient mode: a drop-in for any optimizer."""

from __future__ import annotations

from effadam_hook.modes.mode import Mode

__all__ = ["GradientMode"]


class GradientMode(Mode):
    """Exchange of gradients, which become the ``.grad`` of any optimizer."""
