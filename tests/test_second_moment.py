"""The rules by which second moments follow the gradient."""

from __future__ import annotations

from typing import Any

import pytest

from effadam_hook.optim.second_moment import SecondMomentRule


def steps_with_mean(rule: SecondMomentRule, state: dict[str, Any], steps: int) -> list[int]:
    """Return the steps, counted from 1, that need the mean gradient; update the state in each."""
    found = []
    for step in range(1, steps + 1):
        averaged = rule.needs_mean(state)
        if averaged:
            found.append(step)
        if rule.follows(state, averaged):
            state["refreshed"] = step
        state["step"] = step
    return found


def test_a_local_second_moment_needs_no_mean_and_always_follows() -> None:
    rule = SecondMomentRule("local", 4)
    assert steps_with_mean(rule, {"step": 0}, 10) == []
    assert rule.follows({"step": 7, "refreshed": 7}, averaged=False)
    assert rule.beta2(0.9, {"step": 7, "refreshed": 3}) == 0.9


def test_a_shared_second_moment_is_due_at_first_and_then_regularly() -> None:
    rule = SecondMomentRule("shared", 4)
    assert steps_with_mean(rule, {"step": 0}, 14) == [1, 2, 3, 4, 5, 9, 13]
    assert not rule.follows({"step": 6, "refreshed": 5}, averaged=False)


@pytest.mark.parametrize(("refreshed", "power"), [(7, 1), (4, 4)])
def test_a_shared_second_moment_decays_for_the_steps_in_which_it_was_constant(
    refreshed: int, power: int
) -> None:
    rule = SecondMomentRule("shared", 4)
    assert rule.beta2(0.9, {"step": 7, "refreshed": refreshed}) == 0.9**power


def test_only_a_refresh_at_every_step_always_needs_the_mean() -> None:
    assert SecondMomentRule("shared", 1).always_needs_mean
    assert not SecondMomentRule("shared", 2).always_needs_mean
    assert not SecondMomentRule("local", 1).always_needs_mean


def test_a_frozen_second_moment_is_due_until_its_estimate_is_complete() -> None:
    rule = SecondMomentRule("frozen", 3)
    assert rule.needs_mean({"step": 0})
    assert steps_with_mean(rule, {"step": 0, "refreshed": 0, "estimate_until": 3}, 8) == [1, 2, 3]
    assert steps_with_mean(rule, {"step": 0, "refreshed": 0}, 8) == []


@pytest.mark.parametrize(("refresh_every", "limit"), [(8, 64), (100, 100)])
def test_a_parameter_that_is_long_unused_needs_no_mean(refresh_every: int, limit: int) -> None:
    rule = SecondMomentRule("shared", refresh_every)
    assert rule.needs_mean({"step": 0, "unused": limit - 1})
    assert not rule.needs_mean({"step": 0, "unused": limit})
