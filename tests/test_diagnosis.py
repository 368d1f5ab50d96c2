"""The diagnosis of a wait from the positions of the ranks, and its messages."""

from __future__ import annotations

import json
from dataclasses import replace

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.watchdog.deadlock import Process, Run, Wait, find_deadlock
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
    # A rank whose history has lost the first buckets agrees as well.
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
    behind = replace(HERE, started=1)
    gone = replace(behind, left=True)
    assert who_is_late({1: HERE, 2: HERE}, [], 2) == ""
    text = who_is_late({1: behind, 2: gone, 3: HERE}, [4, 5], 2)
    assert "No answer from rank 4, 5: killed, stopped, or unreachable." in text
    assert "Rank 2 has ended." in text
    assert "Rank 1 has started 1 buckets, this rank 2; it is in bucket 1, uplink." in text
    assert "Rank 3" not in text


def process(
    rank: int, waits: dict[int, Wait | None], **started: int | tuple[int, tuple[int, ...]]
) -> Process:
    """A process whose models have started so many buckets, in thread 1 unless others are named."""
    runs = {
        name: Run(count, (1,)) if isinstance(count, int) else Run(*count)
        for name, count in started.items()
    }
    return Process(rank, waits, runs)


def bucket(run: str, sequence: int) -> Wait:
    return Wait(f"is in bucket {sequence} of {run}", run, sequence)


def diagnosis_of(*processes: Process, run: str = "a") -> EffAdamError | None:
    found = find_deadlock({p.rank: p for p in processes}, run)
    return None if found is None else found.error


def test_models_taken_in_different_orders_are_a_deadlock_over_any_number_of_ranks() -> None:
    two = (
        process(0, {1: bucket("a", 5)}, a=6, b=5),
        process(1, {1: bucket("b", 5)}, a=5, b=6),
    )
    error = diagnosis_of(*two)
    assert isinstance(error, DisagreementError)
    assert "rank 0 is in bucket 5 of a, which rank 1 has not reached" in str(error)
    three = (
        process(0, {1: bucket("a", 0)}, a=1, b=0, c=0),
        process(1, {1: bucket("b", 0)}, a=0, b=1, c=0),
        process(2, {1: bucket("c", 0)}, a=0, b=0, c=1),
    )
    for run in "abc":
        assert diagnosis_of(*three, run=run) is not None
    assert diagnosis_of(*three[:2], run="d") is None


def test_a_rank_with_a_free_thread_is_not_accused() -> None:
    both = (1, 2)
    crossing = (
        process(0, {1: bucket("a", 0), 2: None}, a=(1, both), b=(0, both)),
        process(1, {2: bucket("b", 0), 1: None}, a=(0, both), b=(1, both)),
    )
    assert diagnosis_of(*crossing) is None
    slow = process(0, {1: bucket("a", 3)}, a=4), process(1, {1: None}, a=3)
    assert diagnosis_of(*slow) is None
    under_way = process(0, {1: bucket("a", 3)}, a=4), process(1, {1: bucket("a", 3)}, a=4)
    assert diagnosis_of(*under_way) is None


def test_a_rank_in_a_collective_for_which_a_bucket_waits_is_a_deadlock_once_nobody_is_free() -> (
    None
):
    barrier = Wait("is in barrier() at train.py:31", ranks=(0, 1, 2))
    waiting, through = process(0, {1: bucket("a", 3)}, a=4), process(1, {1: barrier}, a=3)
    free, also = process(2, {1: None}, a=3), process(2, {1: bucket("a", 3)}, a=4)
    assert diagnosis_of(waiting, through, free) is None
    assert diagnosis_of(waiting, through) is None  # nothing is known of rank 2
    error = diagnosis_of(waiting, through, also)
    assert error is not None and not isinstance(error, DisagreementError)
    assert "rank 1 is in barrier() at train.py:31, which ranks 0, 2 have not reached" in str(error)
    # A sender that is heard by somebody goes on.
    from_1 = Wait("is in broadcast()", ranks=(1,))
    assert diagnosis_of(waiting, process(1, {1: None}, a=3), process(2, {1: from_1}, a=3)) is None


def test_the_description_of_a_process_survives_the_store() -> None:
    before = process(1, {1: bucket("a", 3), 2: None, 3: Wait("x", ranks=(0, 2))}, a=4)
    assert Process.from_json(json.loads(json.dumps(before.to_json()))) == before
