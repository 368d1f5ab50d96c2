"""The diagnosis of a wait from the positions of the ranks: who differs, who has failed, who is late.

Every rank computes it from the same positions, so that all ranks raise the same error.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.topology import NodeTable
from effadam_hook.exchange.watchdog.inflight import CONNECTING, Hold, InflightBucket
from effadam_hook.exchange.watchdog.status_board import Entry, Position

__all__ = [
    "disagreement",
    "first_failure",
    "gone_before",
    "no_answer",
    "overdue",
    "who_is_late",
]

CONNECT_S = 15.0
"""Seconds that a silent rank may take while all ranks make connections at once."""


def disagreement(histories: Mapping[int, Iterable[Entry]]) -> DisagreementError | None:
    """Find the first sequence number under which two ranks have started different buckets.

    Args:
        histories: The buckets that each rank has started, by rank.

    Returns:
        An error that says which rank did what; None if the ranks agree.
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
    """Return the failure that the first of the ranks reports.

    Args:
        positions: The positions of the other ranks.

    Returns:
        The error; None if no rank reports one.
    """
    for rank, position in positions.items():
        if position.failure:
            is_disagreement = position.kind == DisagreementError.__name__
            kind = DisagreementError if is_disagreement else EffAdamError
            return kind(f"Rank {rank} reported: {position.failure}")
    return None


def gone_before(positions: Mapping[int, Position], sequence: int) -> EffAdamError | None:
    """Find a rank that has ended its training without starting a certain bucket.

    Args:
        positions: The positions of the other ranks.
        sequence: Sequence number of the bucket.

    Returns:
        An error that names the rank; None if there is none.
    """
    for rank, position in positions.items():
        if position.left and position.started <= sequence:
            return EffAdamError(f"Rank {rank} has ended its training, this rank has not.")
    return None


def no_answer(silent: Sequence[int], nodes: NodeTable | None = None) -> str:
    """Describe the ranks that do not answer.

    Args:
        silent: The ranks.
        nodes: The nodes, if they are known.

    Returns:
        A sentence after a space; empty if all ranks answer.
    """
    if not silent:
        return ""
    ranks = ", ".join(map(str, silent))
    whom = f"rank {ranks}" if nodes is None else nodes.name(silent)
    return f" No answer from {whom}: killed, stopped, or unreachable."


def who_is_late(
    positions: Mapping[int, Position],
    silent: Sequence[int],
    started: int,
    nodes: NodeTable | None = None,
) -> str:
    """Describe the ranks that others may be waiting for.

    Args:
        positions: The positions of the other ranks.
        silent: The ranks that do not answer.
        started: Number of buckets that this rank has started.
        nodes: The nodes, if they are known.

    Returns:
        Sentences, each after a space; empty if no rank is late.
    """
    gone = [str(r) for r, p in positions.items() if p.left and p.started < started]
    behind = [
        f" Rank {rank} has started {position.started} buckets, this rank {started}; "
        f"it {position.doing}."
        for rank, position in positions.items()
        if position.started < started and not position.left
    ]
    text = no_answer(silent, nodes)
    if gone:
        text += f" Rank {', '.join(gone)} has ended."
    return text + "".join(behind[:3])


def overdue(
    oldest: InflightBucket | Hold,
    limit_s: float | None,
    grace_s: float,
    is_silent: bool,
    late: str,
) -> EffAdamError | None:
    """Find a wait that is longer than it may be.

    Args:
        oldest: The bucket or hold in which this rank has waited for longest.
        limit_s: Seconds that a wait may take; None for no limit.
        grace_s: Seconds beyond the limit in which silent ranks may still answer.
        is_silent: Whether some rank does not answer.
        late: Sentences about the late ranks.

    Returns:
        The error; None if the wait is short enough.
    """
    waited_s = time.monotonic() - oldest.since
    if limit_s is not None and waited_s > limit_s + grace_s:
        return EffAdamError(
            f"waited {waited_s:.0f} s, longer than wait_timeout_s={limit_s:g}.{late} Raise "
            "state.wait_timeout_s where ranks may be that slow; otherwise give all of them as "
            "much work."
        )
    # All ranks have reached this phase a moment ago: one that is silent now died before it connected.
    is_connecting = isinstance(oldest, Hold) and oldest.phase == CONNECTING
    if is_connecting and waited_s > CONNECT_S and is_silent:
        return EffAdamError(f"not connected after {waited_s:.0f} s.{late} Restart all ranks.")
    return None
