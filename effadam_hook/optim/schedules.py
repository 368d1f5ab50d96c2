"""Schedules of generic Adam, and a check of the conditions under which it converges.

Generic Adam has a base learning rate α_t and a weight θ_t of the second moment (β2 by step). It
converges if

1. ``0 ≤ β_t ≤ β < 1`` for the first moment's weight;
2. θ_t lies in (0, 1) and does not decrease;
3. ``χ_t = α_t / √(1 - θ_t)`` is almost non-increasing: ``a_t ≤ χ_t ≤ C a_t`` for some non-increasing
   ``a_t`` and a constant C;
4. ``(Σ_{t≤T} α_t √(1 - θ_t)) / (T α_T)`` tends to 0.

Source:
    Towards Practical Adam, arXiv 2101.05471.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Condition", "ConvergenceReport", "PowerSchedule", "Schedule", "check_convergence"]


class Schedule(Protocol):
    """α_t and θ_t by step."""

    def alpha(self, step: int) -> float:
        """Return the base learning rate of a step, counted from 1."""
        ...

    def theta(self, step: int) -> float:
        """Return the weight of the second moment in a step, counted from 1."""
        ...


@dataclass(frozen=True)
class PowerSchedule:
    """``α_t = alpha0 / t^s`` and ``θ_t = 1 - theta0 / t^r``.

    With ``s = 1/2`` and ``r = 1`` all conditions hold. ``r = 0`` keeps θ constant.

    Attributes:
        alpha0: α at the first step, above 0.
        s: Exponent with which α decreases, 0 or more.
        theta0: ``1 - θ`` at the first step, above 0 and at most 1.
        r: Exponent with which θ approaches 1, 0 or more.

    Raises:
        ValueError: If a number is out of its range.
    """

    alpha0: float = 1e-3
    s: float = 0.5
    theta0: float = 0.1
    r: float = 1.0

    def __post_init__(self) -> None:
        for name, value, good, rule in (
            ("alpha0", self.alpha0, self.alpha0 > 0, "above 0"),
            ("s", self.s, self.s >= 0, "0 or more"),
            ("theta0", self.theta0, 0 < self.theta0 <= 1, "above 0 and at most 1"),
            ("r", self.r, self.r >= 0, "0 or more"),
        ):
            if not good:
                raise ValueError(f"Invalid {name}: {value}. Must be {rule}.")

    def alpha(self, step: int) -> float:
        """Return ``alpha0 / step^s``."""
        return float(self.alpha0 / step**self.s)

    def theta(self, step: int) -> float:
        """Return ``1 - theta0 / step^r``."""
        return float(1 - self.theta0 / step**self.r)


@dataclass(frozen=True)
class Condition:
    """The outcome of one condition.

    Attributes:
        holds: Whether it holds up to the horizon.
        value: The number on which the outcome depends.
        meaning: A description of the number, and the rule that it must satisfy.
    """

    holds: bool
    value: float
    meaning: str


@dataclass(frozen=True)
class ConvergenceReport:
    """The four conditions, in the order of :mod:`effadam_hook.optim.schedules`.

    Attributes:
        first_moment: β is below 1.
        second_moment: θ_t is in (0, 1) and does not decrease.
        almost_non_increasing: χ_t is almost non-increasing.
        vanishing: The weighted sum of steps tends to 0.
    """

    first_moment: Condition
    second_moment: Condition
    almost_non_increasing: Condition
    vanishing: Condition

    @property
    def holds(self) -> bool:
        """Return whether all four conditions hold."""
        return all(condition.holds for condition in vars(self).values())

    def __str__(self) -> str:
        lines = [
            f"{'holds' if condition.holds else 'FAILS'}  {name}: {condition.value:.4g} "
            f"({condition.meaning})"
            for name, condition in vars(self).items()
        ]
        return "\n".join(lines)


def check_convergence(schedule: Schedule, horizon: int, beta: float = 0.9) -> ConvergenceReport:
    """Check which conditions of generic Adam a schedule meets.

    Conditions 3 and 4 concern limits; the check computes the trend up to ``horizon``. Condition 3
    counts as met if the necessary C does not grow by more than 1 % over the second half of the
    horizon, condition 4 if its quantity falls by at least 1 % from half the horizon to the horizon.

    Args:
        schedule: α_t and θ_t.
        horizon: Number of steps to evaluate, at least 16.
        beta: The largest weight of the first moment.

    Returns:
        The four outcomes.

    Raises:
        ValueError: If the horizon is too short to show a trend.
    """
    if horizon < 16:
        raise ValueError(f"Invalid horizon: {horizon}. Must be 16 or more, to show a trend.")
    half = horizon // 2
    lowest_theta, largest_drop = math.inf, 0.0
    highest_theta = -math.inf
    running_min = math.inf
    constant = constant_at_half = 1.0
    total = quantity_at_half = 0.0
    for step in range(1, horizon + 1):
        alpha, theta = schedule.alpha(step), schedule.theta(step)
        largest_drop = max(largest_drop, highest_theta - theta)
        lowest_theta, highest_theta = min(lowest_theta, theta), max(highest_theta, theta)
        spread = math.sqrt(max(1 - theta, 0.0))
        chi = alpha / spread if spread else math.inf
        running_min = min(running_min, chi)
        # The smallest C for which the running minimum is a valid a_t.
        constant = max(constant, chi / running_min)
        total += alpha * spread
        if step == half:
            constant_at_half = constant
            quantity_at_half = total / (step * alpha)
    quantity = total / (horizon * schedule.alpha(horizon))
    inside = lowest_theta > 0 and highest_theta < 1
    return ConvergenceReport(
        Condition(0 <= beta < 1, beta, "beta, must be at least 0 and below 1"),
        Condition(
            inside and largest_drop <= 0,
            largest_drop if inside else lowest_theta,
            "largest drop of theta, must be 0"
            if inside
            else f"theta leaves (0, 1), up to {highest_theta:.4g}",
        ),
        Condition(
            constant <= 1.01 * constant_at_half,
            constant,
            f"C that chi needs, was {constant_at_half:.4g} at half the horizon, must not grow",
        ),
        Condition(
            quantity <= 0.99 * quantity_at_half,
            quantity,
            f"sum of steps, was {quantity_at_half:.4g} at half the horizon, must fall to 0",
        ),
    )
