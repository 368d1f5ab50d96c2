"""What all threads of this process wait for, in whichever of its models.

A rank that is late with one model may be waiting in another one, or in a collective of the user's. So a
watchdog publishes not only its own model's position but that of the whole process.
"""

from __future__ import annotations

import sys
import weakref
from typing import Protocol

import torch.distributed as dist

from effadam_hook.exchange.watchdog.deadlock import Process, Run, Wait
from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.stacks import Stacks

__all__ = ["Watched", "describe_process", "open_watchdogs"]


class Watched(Protocol):
    """One model's buckets: :class:`~effadam_hook.exchange.watchdog.watchdog.Watchdog`."""

    run_id: str
    """The same on every rank."""
    name: str
    """How messages name the model."""
    pending: dict[int, InflightBucket]
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


open_watchdogs: weakref.WeakSet[Watched] = weakref.WeakSet()
"""The watches of this process that have not been closed."""

_stacks = Stacks()


def describe_process() -> Process:
    """What the threads that drive models wait for."""
    alive = sys._current_frames().keys()
    watches = list(open_watchdogs)
    drivers = {thread for watchdog in watches for thread in list(watchdog.threads)} & alive
    waits: dict[int, Wait | None] = {}
    runs: dict[str, Run] = {}
    for watchdog in watches:
        threads = tuple(drivers) if watchdog.threads else tuple({watchdog.home} & alive)
        runs[watchdog.run_id] = Run(watchdog.sequence, threads)
        runs[_phases(watchdog)] = Run(watchdog.holds, threads)
        waits.update(dict.fromkeys(threads))
    for watchdog in watches:
        held, joined, newest = (
            watchdog.held,
            watchdog.joined,
            max(list(watchdog.pending), default=None),
        )
        if held is not None:
            doing = f"{held.doing} of {watchdog.name}, {held.phase}"
            waits[held.thread] = Wait(doing, _phases(watchdog), held.number)
        elif joined is not None and newest is not None:
            inflight = watchdog.pending.get(newest)
            where = (
                "" if inflight is None else f"{inflight.label} of {watchdog.name}, {inflight.phase}"
            )
            waits[joined] = Wait(f"is in {where or watchdog.name}", watchdog.run_id, newest)
    for thread, wait in waits.items():
        if wait is None:
            waits[thread] = _stacks.wait_of(thread)
    return Process(dist.get_rank(), waits, runs)


def _phases(watchdog: Watched) -> str:
    return f"{watchdog.run_id}/phases"
