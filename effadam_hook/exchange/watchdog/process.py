"""The waits of all threads of this process, over all of its models.

A rank that is late with one model may wait in another model, or in a collective of the training
program. A watchdog therefore publishes not only the position of its own model, but the waits of the
whole process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.distributed as dist

from effadam_hook.exchange.watchdog.deadlock import Process, Run, Wait
from effadam_hook.exchange.watchdog.flight_record import FlightRecord
from effadam_hook.exchange.watchdog.stacks import Stacks

__all__ = ["describe_process"]

_stacks = Stacks()


def describe_process(records: Sequence[FlightRecord]) -> Process:
    """Describe the waits of the threads that run backward passes.

    Args:
        records: The records of all models of this process.

    Returns:
        The waits by thread, and the progress of each model.
    """
    alive = sys._current_frames().keys()
    drivers = {thread for record in records for thread in list(record.threads)} & alive
    waits: dict[int, Wait | None] = {}
    runs: dict[str, Run] = {}
    for record in records:
        threads = tuple(drivers) if record.threads else tuple({record.home} & alive)
        runs[record.run_id] = Run(record.started, threads)
        runs[_holds(record)] = Run(record.holds, threads)
        waits.update(dict.fromkeys(threads))
    for record in records:
        hold, joined, newest = record.hold, record.joined, max(list(record.in_flight), default=None)
        if hold is not None:
            doing = f"{hold.doing} of {record.name}, {hold.phase}"
            waits[hold.thread] = Wait(doing, _holds(record), hold.number)
        elif joined is not None and newest is not None:
            inflight = record.in_flight.get(newest)
            where = record.name
            if inflight is not None:
                where = f"{inflight.label} of {record.name}, {inflight.phase}"
            waits[joined] = Wait(f"is in {where}", record.run_id, newest)
    for thread, wait in waits.items():
        if wait is None:
            waits[thread] = _stacks.wait_of(thread)
    return Process(dist.get_rank(), waits, runs)


def _holds(record: FlightRecord) -> str:
    """Return the run id under which the holds of a model are counted."""
    return f"{record.run_id}/phases"
