"""A short fuzzing campaign; ``make fuzz MINUTES=30`` runs a long one."""

from __future__ import annotations

import pytest

from fuzz.campaign import run


@pytest.mark.timeout(400)
def test_a_short_campaign_finds_nothing() -> None:
    tally = run(20240, batches=3, batch=11)
    assert tally.wrong == []
    assert tally.runs >= 30
