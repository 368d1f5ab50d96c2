"""What all threads of this process wait for, in whichever of its models.

A rank that is late with one model may be waiting in another one, or in a collective of the user's. So a
watch publishes not only its own model's position but that of the whole process.
"""

from __future__ import annotations

import sys
import weakref
from typing import Protocol

import torch.distributed as dist

from effadam_hook.exchange.deadlock import Process, Run, Wait
from effadam_hook.exchange.passage import Hold, Passage
from effadam_hook.exchange.stacks import Stacks

__all__ = ["Watched", "describe_process", "open_watches"]


class Watched(Protocol):
    """One model's buckets: :class:`~effadam_hook.exchange.watchdog.Watch`."""

    run_id: str
    """The same on every rank."""
    name: str
    """How messages name the model."""
    pending: dict[int, Passage]
    """The buckets under way."""
    held: Hold | None
    """The wait outside a bucket, if any."""
    holds: int
    """How many of those have been started."""
    home: int
    """The thread that attached the model."""
    threads: set[int]
    """The threads that have run backward passes of the model."""
    joined: int | None
    """The thread that waits for the buckets at the end of a backward, if one does."""

    @property
    def sequence(self) -> int:
        """How many buckets have been started."""
        ...


open_watches: weakref.WeakSet[Watched] = weakref.WeakSet()
"""The watches of this process that have not been closed."""

_stacks = Stacks()


def describe_process() -> Process:
    """What the threads that drive models wait for."""
    alive = sys._current_frames().keys()
    watches = list(open_watches)
    drivers = {thread for watch in watches for thread in list(watch.threads)} & alive
    waits: dict[int, Wait | None] = {}
    runs: dict[str, Run] = {}
    for watch in watches:
        threads = tuple(drivers) if watch.threads else tuple({watch.home} & alive)
        runs[watch.run_id] = Run(watch.sequence, threads)
        runs[_phases(watch)] = Run(watch.holds, threads)
        waits.update(dict.fromkeys(threads))
    for watch in watches:
        held, joined, newest = watch.held, watch.joined, max(list(watch.pending), default=None)
        if held is not None:
            doing = f"{held.doing} of {watch.name}, {held.phase}"
            waits[held.thread] = Wait(doing, _phases(watch), held.number)
        elif joined is not None and newest is not None:
            passage = watch.pending.get(newest)
            where = "" if passage is None else f"{passage.label} of {watch.name}, {passage.phase}"
            waits[joined] = Wait(f"is in {where or watch.name}", watch.run_id, newest)
    for thread, wait in waits.items():
        if wait is None:
            waits[thread] = _stacks.wait_of(thread)
    return Process(dist.get_rank(), waits, runs)


def _phases(watch: Watched) -> str:
    return f"{watch.run_id}/phases"
