"""The Gloo groups of an exchange: made by its run id, dropped with it.

``torch.distributed.new_group`` names groups by the order in which a process makes them, so that two
threads that open exchanges in different orders on different ranks get each other's connections. A group
made here is named by the run id on which the ranks have agreed over DDP's own group, and it is known to
nobody else: it ends when the exchange lets go of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import BareGroup, DefaultStore, timeout_of

__all__ = ["GlooGroup", "make_gloo_groups", "make_stage_groups"]

_DEFAULT_TIMEOUT = timedelta(minutes=30)
_SLICE_S = 0.25
_LONGEST_SLEEP_S = 0.05


class _Rendezvous(Store):
    """The default store as Gloo needs it to connect ranks, without keeping it alive.

    Gloo keeps the store of a group, and a store that is kept alive keeps its port from the next default
    process group. A wait for another rank's address can be given up, and leaves the store to other
    threads meanwhile.
    """

    def __init__(self, prefix: str, is_useful: Callable[[], bool]) -> None:
        super().__init__()
        self._inner = DefaultStore(prefix)
        self._is_useful = is_useful

    def set(self, key: str, value: Any) -> None:
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        value = self._inner.get(key)
        assert value is not None
        return value

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return all(self._inner.has(key) for key in keys)

    def wait(self, keys: list[str], timeout: timedelta = _DEFAULT_TIMEOUT) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        sleep_s = 0.001
        while not self.check(keys):
            if not self._is_useful():
                raise RuntimeError("connecting was given up.")
            if time.monotonic() > deadline:
                raise RuntimeError(f"a rank has not connected within {timeout}.")
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)


@dataclass(eq=False)
class GlooGroup:
    """A Gloo group and the store that it refers to.

    Attributes:
        group: The group.
        store: Kept for as long as the group.
    """

    group: BareGroup
    store: object


def make_gloo_groups(
    stages: Sequence[tuple[str, tuple[int, ...] | None]],
    run_id: str,
    group: dist.ProcessGroup,
    is_useful: Callable[[], bool],
) -> list[GlooGroup]:
    """Make Gloo groups with ranks and time-out of a process group; a collective operation.

    Connecting happens in C++, where neither Ctrl-C nor another rank's end is noticed. A thread does
    it, and this function waits for the thread.

    Args:
        stages: For each group its name, the same on every rank, and the ranks of ``group`` that
            this rank's instance of it connects, ascending; None for all ranks. The instances of one
            name are disjoint.
        run_id: The same on all ranks, and no other exchange's.
        group: DDP's process group.
        is_useful: Queried several times a second; connecting is given up when it is False.

    Returns:
        The groups, in the order of the stages.

    Raises:
        EffAdamError: If connecting was given up.
        RuntimeError: If Gloo cannot connect.
    """
    timeout = timeout_of(group, torch.device("cpu")) or _DEFAULT_TIMEOUT
    everyone = tuple(range(group.size()))
    gave_up = threading.Event()
    made: list[GlooGroup] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def connect() -> None:
        try:
            for name, subset in stages:
                ranks = everyone if subset is None else subset
                key = name if subset is None else f"{name}/{ranks[0]}"
                store = _Rendezvous(f"effadam/{run_id}/{key}", lambda: not gave_up.is_set())
                rank, size = ranks.index(group.rank()), len(ranks)
                bare: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
                made.append(GlooGroup(bare, store))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=connect, name="effadam-connect", daemon=True).start()
    try:
        while not done.wait(_SLICE_S):
            if not is_useful():
                raise EffAdamError("the exchange has stopped.")
    finally:
        gave_up.set()
    if errors:
        raise errors[0]
    return made


def make_stage_groups(
    subsets: Sequence[tuple[int, ...] | None], group: dist.ProcessGroup
) -> list[dist.ProcessGroup]:
    """Make groups of the user's backend for parts of a process group; a collective operation.

    Every rank makes its groups in the order of ``subsets``. Equal subsets share a group, so that
    there are as few communicators as possible.

    Args:
        subsets: For each stage the ranks of ``group`` that this rank's collective connects, ascending;
            None for all ranks.
        group: DDP's process group.

    Returns:
        One group for each stage; ``group`` itself where all ranks take part.
    """
    made: dict[tuple[int, ...] | None, dist.ProcessGroup] = {None: group}
    for subset in subsets:
        if subset not in made:
            assert subset is not None
            ranks = [dist.get_global_rank(group, rank) for rank in subset]
            made[subset] = dist.new_group(ranks, use_local_synchronization=True)
    return [made[subset] for subset in subsets]
