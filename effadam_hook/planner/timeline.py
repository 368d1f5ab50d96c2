"""How long buckets take on their way while backward runs, given what each part of the way takes.

A bucket passes *stages*. A stage works on one bucket at a time, first in, first out, and all stages
work at once, on different buckets, as far as the *resources* allow::

    backward ─► encode ─► uplink ─► reduce ─► downlink ─► decode
                 cpu     link out    cpu      link out     cpu
                         link in              link in

A piece of work says how long it takes alone, and which share of each resource it needs to go on at
that speed. While the shares of a resource add up to more than there is of it, everything that needs
it slows down alike. Backward is one more piece of work, which makes bucket after bucket ready.

This module is floats only.
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
    """What one stage does with one bucket.

    Attributes:
        stage: Name of the stage; the empty name is that of pure delay, which any number of buckets
            can undergo at once.
        seconds: How long it takes alone.
        uses: By name of the resource, how much of it the work takes while it goes on at full speed.
    """

    stage: str
    seconds: float
    uses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Transit:
    """One bucket's way.

    Attributes:
        ready: The part of backward, from 0 to 1, after which its gradients are there.
        works: What is done with it, in order.
    """

    ready: float
    works: Sequence[Work]


class _Task:
    """Work under way."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.left_s = work.seconds


def run_timeline(
    backward: Work, transits: Sequence[Transit], capacity: Mapping[str, float]
) -> tuple[float, float]:
    """Let backward and the buckets run until all is done.

    Args:
        backward: The backward pass; its stage's name is not looked at.
        transits: The buckets, in the order in which they become ready.
        capacity: How much there is of each resource; of those that are not named there is enough.

    Returns:
        Seconds from backward's begin to the last bucket's end, and to backward's own end.

    Raises:
        ValueError: If the buckets are not in the order in which they become ready.
    """
    if any(a.ready > b.ready for a, b in pairwise(transits)):
        raise ValueError(
            f"Invalid transits: ready at {[p.ready for p in transits]} of backward. Must be in the "
            "order in which they become ready."
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
            # Earlier buckets come first, so that the head of each stage's queue is its oldest.
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
