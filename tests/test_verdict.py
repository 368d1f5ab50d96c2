"""What ranks conclude from one another's positions, and what they say of it."""

from __future__ import annotations

from dataclasses import replace

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.watchdog.diagnosis import (
    disagreement,
    first_failure,
    gone_before,
    who_is_late,
)
from effadam_hook.exchange.watchdog.status_board import Position

A = (0, "bucket 0", "a compressed exchange", "aa")
B = (1, "bucket 1", "a compressed exchange", "bb")
DENSE = (1, "bucket 1", "a dense average", "")
HERE = Position(2, "is in bucket 1, uplink", False, None, "NoneType", [A, B])


def test_ranks_that_are_only_further_behind_agree() -> None:
    assert disagreement({0: [A, B], 1: [A], 2: []}) is None
    # Who remembers only the last ones agrees as well.
    assert disagreement({0: [A, B], 1: [B]}) is None


def test_a_disagreement_names_the_first_place_and_what_each_rank_does_there() -> None:
    later = (2, "bucket 2", "a dense average", "")
    error = disagreement({0: [A, B, A], 2: [A, B], 1: [A, DENSE, later]})
    assert isinstance(error, DisagreementError)
    assert "exchange 1: rank 1 does a dense average in bucket 1 and rank 0 does a comp" in str(
        error
    )
    assert "bucket 2" not in str(error) and "rank 2" not in str(error)


def test_buckets_of_different_parameters_are_told_apart_by_their_layouts() -> None:
    error = disagreement({0: [A], 1: [(0, "bucket 0", "a compressed exchange", "cc")]})
    assert "(layout cc, not aa)" in str(error)


def test_the_first_report_of_a_failure_counts_and_keeps_its_kind() -> None:
    failed = replace(HERE, failure="it broke.", kind="EffAdamError")
    disagreed = replace(HERE, failure="it differs.", kind="DisagreementError")
    assert first_failure({0: HERE, 3: HERE}) is None
    error = first_failure({0: HERE, 1: failed, 2: disagreed})
    assert str(error) == "Rank 1 reported: it broke." and not isinstance(error, DisagreementError)
    assert isinstance(first_failure({2: disagreed}), DisagreementError)


def test_a_rank_that_left_is_missed_only_by_buckets_that_it_never_started() -> None:
    left = replace(HERE, left=True)
    assert gone_before({1: left}, 1) is None
    assert "Rank 1 has ended" in str(gone_before({1: left}, 2))
    assert gone_before({1: HERE}, 2) is None


def test_the_late_are_those_that_are_silent_gone_or_behind() -> None:
    behind = replace(HERE, sequence=1)
    gone = replace(behind, left=True)
    assert who_is_late({1: HERE, 2: HERE}, [], 2) == ""
    text = who_is_late({1: behind, 2: gone, 3: HERE}, [4, 5], 2)
    assert "No answer from rank 4, 5: killed, stopped, or unreachable." in text
    assert "Rank 2 has ended." in text
    assert "Rank 1 has started 1 buckets, this rank 2; it is in bucket 1, uplink." in text
    assert "Rank 3" not in text
