"""The collective of the training program in which a thread waits, read from its Python stack.

A rank that has run out of batches may wait in ``barrier``, or in the ``all_reduce`` of an
evaluation, for ranks that wait for its next bucket. torch does not record which thread is in which
collective, but the functions of ``torch.distributed`` are Python, and their frames hold the group
in a variable. Stacks are read only while a bucket is late.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from effadam_hook.exchange.watchdog.deadlock import Wait

__all__ = ["Stacks"]

STAYS_S = 1.0
"""Seconds for which a thread must have been at the same place to count as waiting there."""

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_INSIDE = f"{_TORCH}distributed{os.sep}"
_DDP = str(Path(_TORCH) / "nn" / "parallel" / "distributed.py")

_FROM_ALL = {
    "_all_gather_base",
    "_reduce_scatter_base",
    "_verify_param_shape_across_processes",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
}
_FROM_ROOT = {
    "_distributed_broadcast_coalesced": "authoritative_rank",
    "_sync_params_and_buffers": "src",
    "broadcast": "src",
    "broadcast_object_list": "src",
    "recv": "src",
    "scatter": "src",
    "scatter_object_list": "src",
}
_TO_ROOT = {"gather": "dst", "gather_object": "dst", "reduce": "dst"}


@dataclass
class _Seen:
    place: tuple[int, int, str]
    since: float


class Stacks:
    """The place of each thread, and since when it has been there."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()

    def wait_of(self, thread: int) -> Wait | None:
        """Return the collective of the training program in which a thread waits.

        Args:
            thread: Identifier of the thread.

        Returns:
            The function, the line of the program that called it, and the ranks for which it waits;
            None if the thread is elsewhere, or has arrived a moment ago.
        """
        top = sys._current_frames().get(thread)
        found = None if top is None else _collective(top)
        with self._lock:
            if found is None:
                self._seen.pop(thread, None)
                return None
            place = (id(found), found.f_lasti, found.f_code.co_name)
            seen = self._seen.get(thread)
            if seen is None or seen.place != place:
                seen = self._seen[thread] = _Seen(place, time.monotonic())
            if time.monotonic() - seen.since < STAYS_S:
                return None
        name = found.f_code.co_name
        try:
            ranks = _awaited(name, found.f_locals)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            ranks = []  # a group that has been destroyed, or another version's arguments
        return Wait(f"is in {name}() at {_users_line(found)}", ranks=tuple(ranks))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _collective(top: FrameType) -> FrameType | None:
    """Return the innermost frame of a collective, unless the thread runs other code within it."""
    for frame in _outwards(top):
        file = frame.f_code.co_filename
        if not file.startswith(_INSIDE) and file != _DDP:
            return None
        name = frame.f_code.co_name
        if name in _FROM_ALL or name in _FROM_ROOT or name in _TO_ROOT:
            return frame
    return None


def _users_line(frame: FrameType) -> str:
    for outer in _outwards(frame):
        if not outer.f_code.co_filename.startswith(_TORCH):
            return f"{outer.f_code.co_filename}:{outer.f_lineno}"
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _awaited(name: str, variables: dict[str, Any]) -> list[int]:
    """Return the global ranks without which a collective cannot end on this rank."""
    group = variables.get("group", variables.get("process_group"))
    if group is None and "self" in variables:
        group = variables["self"].process_group
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if name in _FROM_ALL:
        return ranks
    variable = _FROM_ROOT.get(name) or _TO_ROOT[name]
    # DDP's two functions number ranks within the group.
    within = variables.get(
        f"group_{variable}", variables[variable] if name.startswith("_") else None
    )
    root = ranks[within] if within is not None else variables[variable]
    if root is None:  # from any rank
        return []
    if root != dist.get_rank():
        return [root]
    return ranks if name in _TO_ROOT else []
