"""Timeline of the buckets of one step, from the duration of each of their stages.

A bucket passes through *stages*. A stage processes one bucket at a time, first in, first out. All
stages run concurrently, on different buckets, within the limits of the *resources*::

    backward ─► encode ─► uplink ─► reduce ─► downlink ─► decode
                 cpu     link out    cpu      link out     cpu
                         link in              link in

A piece of work has a duration when it runs alone, and the share of each resource that it needs to run
at that speed. If the shares of a resource add up to more than its capacity, all work that needs it
slows down by the same factor. Backward is also a piece of work; its progress makes buckets ready.

This module contains floats only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = ["Transit", "Work", "run_timeline"]

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Work:
    """Work of one stage on one bucket.

    Attributes:
        stage: Name of the stage. An empty name means a delay, which applies to any number of buckets
            concurrently.
        seconds: Duration when the work runs alone.
        uses: Amount of each resource that the work occupies at full speed, by name of the resource.
    """

    stage: str
    seconds: float
    uses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Transit:
    """Sequence of work on one bucket.

    Attributes:
        ready: Fraction of backward, from 0 to 1, after which the bucket's gradients are ready.
        works: The work, in order.
    """

    ready: float
    works: Sequence[Work]


class _Task:
    """Work in progress."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.left_s = work.seconds


def run_timeline(
    backward: Work, transits: Sequence[Transit], capacity: Mapping[str, float]
) -> tuple[float, float]:
    """Simulate backward and the buckets until all work is finished.

    Args:
        backward: The backward pass. The name of its stage is ignored.
        transits: The buckets, in the order in which they become ready.
        capacity: Capacity of each resource by name; unlimited for names that are missing.

    Returns:
        Seconds from the start of backward to the end of the last bucket, and to the end of backward.

    Raises:
        ValueError: If the buckets are not in the order in which they become ready.
    """
    if any(a.ready > b.ready for a, b in pairwise(transits)):
        raise ValueError(
            f"Invalid transits: ready at {[p.ready for p in transits]} of backward. Must be in the "
            "order in which the buckets become ready."
        )
    clock = backward_end_s = 0.0
    running = _Task(backward)
    position = [0] * len(transits)
    tasks: dict[int, _Task] = {}
    done = sum(not transit.works for transit in transits)
    while done < len(transits) or running.left_s > 0:
        progress = 1.0 - running.left_s / backward.seconds if running.left_s > 0 else 1.0
        busy: set[str] = set()
        tasks_now: dict[int, _Task] = {}
        for index, transit in enumerate(transits):
            if position[index] == len(transit.works) or transit.ready > progress + _ROUNDING:
                continue
            work = transit.works[position[index]]
            # Buckets are visited oldest first, so a stage always takes its oldest bucket.
            if work.stage and work.stage in busy:
                continue
            busy.add(work.stage)
            tasks_now[index] = tasks.get(index) or _Task(work)
        tasks = tasks_now
        active = list(tasks.values()) + ([running] if running.left_s > 0 else [])
        speeds = _speeds([task.work for task in active], capacity)
        step_s = min(
            (task.left_s / speed for task, speed in zip(active, speeds, strict=True)),
            default=0.0,
        )
        if running.left_s > 0:
            waiting = [p.ready for p in transits if p.ready > progress + _ROUNDING]
            if waiting:
                until_s = (waiting[0] - progress) * backward.seconds / speeds[-1]
                step_s = min(step_s, until_s)
        clock += step_s
        for task, speed in zip(active, speeds, strict=True):
            task.left_s -= step_s * speed
            if task.left_s <= _ROUNDING * max(1.0, task.work.seconds):
                task.left_s = 0.0
        if running.left_s == 0.0 and backward_end_s == 0.0:
            backward_end_s = clock
        for index, task in list(tasks.items()):
            if task.left_s == 0.0:
                del tasks[index]
                position[index] += 1
                done += position[index] == len(transits[index].works)
    return clock, backward_end_s


def _speeds(works: Sequence[Work], capacity: Mapping[str, float]) -> list[float]:
    loads: dict[str, float] = {}
    for work in works:
        for name, share in work.uses.items():
            loads[name] = loads.get(name, 0.0) + share
    slow = {
        name: min(1.0, capacity.get(name, math.inf) / load) if load > 0 else 1.0
        for name, load in loads.items()
    }
    return [
        min((slow[name] for name, share in work.uses.items() if share > 0), default=1.0)
        for work in works
    ]
