"""What follows from the ranks' positions: who does something else, who has failed, who is late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.watchdog.status_board import Entry, Position

__all__ = ["disagreement", "first_failure", "gone_before", "who_is_late"]


def disagreement(histories: Mapping[int, Iterable[Entry]]) -> DisagreementError | None:
    """The first place in the sequence at which two ranks did different things.

    Args:
        histories: The buckets that each rank has started, by rank.

    Returns:
        An error that says who did what there; None where they agree.
    """
    by_rank = {
        rank: {sequence: tuple(rest) for sequence, *rest in history}
        for rank, history in histories.items()
    }
    first, *others = sorted(by_rank)
    differences = [
        (sequence, rank, entry, by_rank[first][sequence])
        for rank in others
        for sequence, entry in by_rank[rank].items()
        if by_rank[first].get(sequence, entry) != entry
    ]
    if not differences:
        return None
    sequence = min(number for number, *_ in differences)
    said = "; ".join(
        f"rank {rank} does {there[1]} in {there[0]}{_made_of(there, here)} and rank {first} does "
        f"{here[1]} in {here[0]}"
        for number, rank, there, here in differences
        if number == sequence
    )
    return DisagreementError(
        f"The ranks disagree about exchange {sequence}: {said}. Switch and configure all ranks "
        "alike, and run the same backward passes on all of them."
    )


def _made_of(there: Sequence[str], here: Sequence[str]) -> str:
    return f" (layout {there[2]}, not {here[2]})" if there[:2] == here[:2] else ""


def first_failure(positions: Mapping[int, Position]) -> EffAdamError | None:
    """What the first rank to have failed reported, if one has."""
    for rank, position in positions.items():
        if position.failure:
            is_disagreement = position.kind == DisagreementError.__name__
            kind = DisagreementError if is_disagreement else EffAdamError
            return kind(f"Rank {rank} reported: {position.failure}")
    return None


def gone_before(positions: Mapping[int, Position], sequence: int) -> EffAdamError | None:
    """That a rank has ended without starting the bucket of that place in the sequence, if one has."""
    for rank, position in positions.items():
        if position.left and position.sequence <= sequence:
            return EffAdamError(f"Rank {rank} has ended its training, this rank has not.")
    return None


def who_is_late(positions: Mapping[int, Position], silent: Sequence[int], sequence: int) -> str:
    """Sentences about the ranks that others may be waiting for.

    Args:
        positions: What the ranks have said.
        silent: The ranks that do not answer.
        sequence: How many buckets this rank has started.

    Returns:
        The sentences, each after a space; nothing if nobody is late.
    """
    gone = [str(r) for r, p in positions.items() if p.left and p.sequence < sequence]
    behind = [
        f" Rank {rank} has started {position.sequence} buckets, this rank {sequence}; "
        f"it {position.doing}."
        for rank, position in positions.items()
        if position.sequence < sequence and not position.left
    ]
    text = ""
    if silent:
        ranks = ", ".join(map(str, silent))
        text += f" No answer from rank {ranks}: killed, stopped, or unreachable."
    if gone:
        text += f" Rank {', '.join(gone)} has ended."
    return text + "".join(behind[:3])
