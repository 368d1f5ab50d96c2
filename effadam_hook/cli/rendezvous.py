"""Whether all ranks were asked the same, found out before anything could wait for ever.

Ranks that measure different methods, or use different backends, would wait for one another until a
time limit ends them, and no message would say why. So every rank first writes what it was asked to the
store by which ranks find one another, and reads what the others wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from effadam_hook.errors import CommandError

__all__ = ["check_command_lines"]

_TIMEOUT = timedelta(minutes=5)
_READ_TIMEOUT = timedelta(seconds=10)
_PRIVATE = ("run", "json")
"""What does not change what ranks do together."""


def check_command_lines(
    args: argparse.Namespace, device: torch.device, backend: str
) -> tuple[Store, int, int]:
    """Check that all ranks were asked the same; every rank must call it.

    Args:
        args: What this rank was asked, its ``command`` included.
        device: Where it computes.
        backend: Of its process groups.

    Returns:
        The store, this rank and the number of ranks, for ``init_process_group``.

    Raises:
        CommandError: On every rank, if they were not, with what each of them has.
        DistError: If a rank does not come.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    asked = {key: value for key, value in vars(args).items() if key not in _PRIVATE}
    mine = {**asked, "device": device.type, "backend": backend}
    board = PrefixStore("effadam/agreement", store)
    board.set(str(rank), json.dumps(mine, default=str))
    keys = [str(other) for other in range(world_size)]
    board.wait(keys, _TIMEOUT)
    all_asked = [json.loads(board.get(key)) for key in keys]
    differing = _differing(all_asked)
    if differing:
        # The store ends with rank 0's process: that one leaves last.
        board.set(f"read/{rank}", "")
        if rank == 0:
            _wait_for_readers(board, [f"read/{key}" for key in keys])
        raise CommandError(
            f"The ranks were not asked the same: {'; '.join(differing)}. Must be one command line on "
            "every host; --device cpu or cuda where --device auto finds GPUs on some hosts only."
        )
    return store, rank, world_size


def _differing(all_asked: list[dict[str, object]]) -> list[str]:
    """For every name whose value is not one, what each rank has."""
    names = dict.fromkeys(name for asked in all_asked for name in asked)
    found = []
    for name in names:
        ranks: dict[str, list[str]] = {}
        for rank, asked in enumerate(all_asked):
            value = json.dumps(asked[name]) if name in asked else "not there"
            ranks.setdefault(value, []).append(str(rank))
        if len(ranks) > 1:
            told = [f"{value} on rank {', '.join(those)}" for value, those in ranks.items()]
            found.append(f"{name} is {' and '.join(told)}")
    return found


def _wait_for_readers(board: Store, keys: list[str]) -> None:
    # A rank that does not read in time is gone, and needs no answer.
    with contextlib.suppress(dist.DistError):
        board.wait(keys, _READ_TIMEOUT)
