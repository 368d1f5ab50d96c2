"""Deadlocks: threads that wait for one another for ever, found from the waits of all processes.

A thread that runs backward passes waits in a *bucket*, or in a *hold* such as opening the exchange,
for all ranks that have not reached the same one; or it waits in a *collective* of the training
program, such as ``barrier``, for the ranks of that group. A rank can start what it has not started
only in a thread that does not wait itself. The search begins with all waiting threads and removes
those that some other thread can still release, until none is removed. The rest wait for ever,
whatever the number of ranks and models. A thread that computes, sleeps or loads data is never among
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effadam_hook.errors import DisagreementError, EffAdamError

__all__ = ["Deadlock", "Process", "Run", "Wait", "find_deadlock"]

_MOST_SHOWN = 4


@dataclass(frozen=True)
class Wait:
    """The wait of one thread.

    Attributes:
        doing: The predicate of a sentence whose subject is the rank.
        run: Run id of the model's buckets, or of its holds; empty for a collective of the training
            program.
        sequence: Sequence number within that run.
        ranks: Global ranks for which a collective of the training program waits.
    """

    doing: str
    run: str = ""
    sequence: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """The progress of a process with the buckets, or the holds, of one model.

    Attributes:
        started: Number of buckets, or holds, that it has started.
        threads: Identifiers of the threads that may start the next one.
    """

    started: int
    threads: tuple[int, ...]


@dataclass(frozen=True)
class Process:
    """The threads of one process that run backward passes.

    Attributes:
        rank: Its global rank.
        waits: The wait of each thread, by identifier; None for a thread that does not wait.
        runs: The progress with its models, by run id.
    """

    rank: int
    waits: Mapping[int, Wait | None]
    runs: Mapping[str, Run]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Process:
        """Rebuild a process from the values of :meth:`to_json`."""
        waits = {
            int(thread): None if wait is None else Wait(**{**wait, "ranks": tuple(wait["ranks"])})
            for thread, wait in values["waits"].items()
        }
        runs = {
            run_id: Run(run["started"], tuple(run["threads"]))
            for run_id, run in values["runs"].items()
        }
        return cls(values["rank"], waits, runs)


Stuck = dict[tuple[int, int], Wait]


@dataclass(frozen=True)
class Deadlock:
    """Threads that wait for one another for ever.

    Attributes:
        waits: The waits by rank and thread; equal at a later time if nothing has moved since.
        ranks: Global ranks of the threads.
        runs: Run ids of their models.
        error: The error, which says who waits where, and for whom.
    """

    waits: frozenset[tuple[tuple[int, int], Wait]]
    ranks: frozenset[int]
    runs: frozenset[str]
    error: EffAdamError


def find_deadlock(processes: Mapping[int, Process], run: str) -> Deadlock | None:
    """Find threads that wait for one another for ever, among them one in a certain run.

    Args:
        processes: The known processes, by global rank.
        run: A model's run id.

    Returns:
        The threads; None if some thread can still release them. Processes are not described at one
        moment: a deadlock is certain only if a later description of all of them is equal.
    """
    stuck: Stuck = {
        (rank, thread): wait
        for rank, process in processes.items()
        for thread, wait in process.waits.items()
        if wait is not None
    }
    while released := [
        key for key, wait in stuck.items() if not _missing(processes, stuck, key, wait)
    ]:
        for key in released:
            del stuck[key]
    runs = frozenset(wait.run.partition("/")[0] for wait in stuck.values() if wait.run)
    if run not in runs:
        return None
    ranks = frozenset(rank for rank, _ in stuck)
    return Deadlock(frozenset(stuck.items()), ranks, runs, _error(processes, stuck))


def _error(processes: Mapping[int, Process], stuck: Stuck) -> EffAdamError:
    lines = []
    for (rank, thread), wait in sorted(stuck.items(), key=lambda item: item[0]):
        missing = _missing(processes, stuck, (rank, thread), wait)
        others = ", ".join(map(str, missing))
        verb = f"ranks {others} have" if len(missing) > 1 else f"rank {others} has"
        lines.append(f"rank {rank} {wait.doing}, which {verb} not reached")
    more = f"; and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
    text = f"The ranks wait for one another for ever: {'; '.join(lines[:_MOST_SHOWN])}{more}. "
    if all(wait.run for wait in stuck.values()):
        return DisagreementError(
            text
            + "Run the backward passes of several models in the same order on all ranks, and call "
            "full_state_dict() on all of them."
        )
    return EffAdamError(
        text
        + "Give all ranks equally many batches (DistributedSampler, drop_last=True) or train under "
        "ddp_model.join(), and call every collective at the same place on all ranks."
    )


def _missing(
    processes: Mapping[int, Process], stuck: Stuck, key: tuple[int, int], wait: Wait
) -> list[int]:
    """Return the ranks for which a thread waits in vain, as far as is known."""
    if wait.run:
        return list(_not_coming(processes, stuck, key[0], wait))
    others = [rank for rank in wait.ranks if rank != key[0]]
    # A rank may have started the collective without waiting for it; then only a rank that is busy
    # elsewhere is missing, and it may come.
    if any(not _all_wait(processes, rank) for rank in others):
        return []
    return [rank for rank in others if _all_in_buckets(processes, stuck, rank)]


def _not_coming(
    processes: Mapping[int, Process], stuck: Stuck, own: int, wait: Wait
) -> Iterator[int]:
    for rank, process in processes.items():
        run = process.runs.get(wait.run)
        if rank == own or run is None or run.started > wait.sequence or not run.threads:
            continue
        if all((rank, thread) in stuck for thread in run.threads):
            yield rank


def _all_wait(processes: Mapping[int, Process], rank: int) -> bool:
    process = processes.get(rank)
    return process is not None and bool(process.waits) and all(process.waits.values())


def _all_in_buckets(processes: Mapping[int, Process], stuck: Stuck, rank: int) -> bool:
    waits = [stuck.get((rank, thread)) for thread in processes[rank].waits]
    return bool(waits) and all(wait is not None and wait.run for wait in waits)
