"""Check that all ranks were started with the same command line, before anything can block.

Ranks that measure different methods, or use different backends, would wait for one another until a
timeout, and no message would name the reason. So every rank first writes its arguments to the store of
the rendezvous and reads those of the other ranks.
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
"""Arguments that do not affect what ranks do together."""


def check_command_lines(
    args: argparse.Namespace, device: torch.device, backend: str
) -> tuple[Store, int, int]:
    """Check that all ranks have the same arguments; a collective operation.

    Args:
        args: Arguments of this rank, including ``command``.
        device: Device of this rank.
        backend: Backend of its process groups.

    Returns:
        The store, this rank and the number of ranks, for ``init_process_group``.

    Raises:
        CommandError: On every rank, if the arguments differ, with the values of every rank.
        DistError: If a rank does not arrive before the timeout.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    given = {key: value for key, value in vars(args).items() if key not in _PRIVATE}
    own = {**given, "device": device.type, "backend": backend}
    shared = PrefixStore("effadam/arguments", store)
    shared.set(str(rank), json.dumps(own, default=str))
    keys = [str(other) for other in range(world_size)]
    shared.wait(keys, _TIMEOUT)
    differing = _differing([json.loads(shared.get(key)) for key in keys])
    if differing:
        # The store ends with rank 0's process, so rank 0 leaves last.
        shared.set(f"read/{rank}", "")
        if rank == 0:
            _wait_for_readers(shared, [f"read/{key}" for key in keys])
        raise CommandError(
            f"The command lines of the ranks differ: {'; '.join(differing)}. Must be equal on every "
            "host. Use --device cpu or cuda if --device auto finds GPUs on some hosts only."
        )
    return store, rank, world_size


def _differing(arguments: list[dict[str, object]]) -> list[str]:
    """Describe the arguments that are not equal on all ranks."""
    names = dict.fromkeys(name for one in arguments for name in one)
    differing = []
    for name in names:
        ranks: dict[str, list[str]] = {}
        for rank, one in enumerate(arguments):
            value = json.dumps(one[name]) if name in one else "not set"
            ranks.setdefault(value, []).append(str(rank))
        if len(ranks) > 1:
            values = [f"{value} on rank {', '.join(those)}" for value, those in ranks.items()]
            differing.append(f"{name} is {' and '.join(values)}")
    return differing


def _wait_for_readers(shared: Store, keys: list[str]) -> None:
    # A rank that does not read in time has ended and needs no message.
    with contextlib.suppress(dist.DistError):
        shared.wait(keys, _READ_TIMEOUT)
