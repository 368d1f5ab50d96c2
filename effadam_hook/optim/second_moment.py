"""The rule by which the second moment of a parameter follows its gradient.

- ``"local"``: it follows the gradient of its own worker at every step.
- ``"matched"``: the same, and :mod:`effadam_hook.optim.matching` corrects the steps.
- ``"shared"``: it follows the squared mean gradient in the first ``refresh_every`` steps and in every
  ``refresh_every``-th step after them. It is constant in between.
- ``"frozen"``: it follows the squared mean gradient during the dense warm-up steps, and is constant
  afterwards. A parameter that the warm-up did not use estimates it in its own first ``refresh_every``
  steps.

Every function reads the state of one parameter, whose entries :mod:`effadam_hook.feedback.moments`
describes. Step counts are equal on all ranks, and so are the decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SECOND_MOMENTS", "SecondMomentRule"]

SECOND_MOMENTS = ("local", "matched", "shared", "frozen")
"""Names of the rules."""

_MAX_UNUSED = 64
"""Least number of unused backward passes after which a parameter requests no mean gradient."""


@dataclass(frozen=True)
class SecondMomentRule:
    """One of the rules.

    Attributes:
        name: One of :data:`SECOND_MOMENTS`.
        refresh_every: Number of steps, see the module.
    """

    name: str
    refresh_every: int

    @property
    def is_local(self) -> bool:
        """Return whether every worker has a second moment of its own."""
        return self.name in ("local", "matched")

    @property
    def always_needs_mean(self) -> bool:
        """Return whether every step needs the mean gradient."""
        return self.name == "shared" and self.refresh_every == 1

    def needs_mean(self, state: Mapping[str, Any]) -> bool:
        """Return whether the next step of a parameter needs the mean gradient.

        Args:
            state: The state of the parameter.

        Returns:
            True if the second moment is due for a mean gradient. False for a parameter that has been
            unused for long: its bucket would otherwise be averaged at every step.
        """
        if state.get("unused", 0) >= max(_MAX_UNUSED, self.refresh_every):
            return False
        step = state["step"] + 1
        if self.name == "shared":
            # A second moment of few gradients makes steps of random size.
            return bool(step <= self.refresh_every or (step - 1) % self.refresh_every == 0)
        if self.name == "frozen":
            return "refreshed" not in state or step <= state.get("estimate_until", 0)
        return False

    def follows(self, state: Mapping[str, Any], averaged: bool) -> bool:
        """Return whether the second moment follows the gradient in the next step.

        Args:
            state: The state of the parameter.
            averaged: Whether the gradient is the mean of all workers.
        """
        if self.is_local or "refreshed" not in state:
            return True
        if self.name == "shared":
            return averaged
        return averaged and state["step"] < state.get("estimate_until", 0)

    def beta2(self, beta2: float, state: Mapping[str, Any]) -> float:
        """Return β2 of a step in which the second moment follows the gradient.

        Args:
            beta2: β2 per step.
            state: The state of the parameter.

        Returns:
            ``beta2``; with ``"shared"``, to the power of the steps since the last mean gradient.
        """
        if self.name != "shared":
            return beta2
        step = state["step"] + 1
        return float(beta2 ** (step - state.get("refreshed", step - 1)))
