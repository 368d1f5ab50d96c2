"""Waits for other ranks outside a bucket, such as the comparison of options.

A *phase* names such a wait. Within it every collective is waited for in slices, so that Ctrl-C is
received and a stop of the exchange ends the wait. An error of a collective leaves the phase with
the rank, the name and the remedy.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import (
    Group,
    all_gather_flat,
    gather_to_first,
    wait_while,
)

__all__ = ["finish", "gather_bytes", "phase"]

_WARN_S = 6.0
_POLL_S = 0.001

_log = logging.getLogger(__name__)


@dataclass
class _Phase:
    rank: int
    name: str
    is_useful: Callable[[], bool]
    warns: bool
    since: float = field(default_factory=time.monotonic)

    def goes_on(self) -> bool:
        if self.warns and time.monotonic() - self.since > _WARN_S:
            self.warns = False
            _log.warning(
                "Rank %d has waited %.0f s in %s: another rank has not reached it yet.",
                *(self.rank, _WARN_S, self.name),
            )
        return self.is_useful()


class _Current(threading.local):
    phase: _Phase | None = None


_current = _Current()


@contextlib.contextmanager
def phase(rank: int, name: str, is_useful: Callable[[], bool] | None = None) -> Iterator[None]:
    """Name the wait of this thread.

    Args:
        rank: This rank in the group.
        name: Name of the wait, for messages such as "Rank 0, comparing options: ...".
        is_useful: Called twice a second; waiting ends when it returns False. It belongs to a
            watchdog, which also warns of slow ranks. Without it waiting goes on, and a warning is
            logged here.

    Raises:
        EffAdamError: If a collective has failed; an error of this package passes unchanged.
    """
    outer = _current.phase
    _current.phase = _Phase(rank, name, is_useful or (lambda: True), is_useful is None)
    try:
        yield
    except EffAdamError:
        raise
    except RuntimeError as error:
        if is_useful is not None:
            raise  # the watchdog consults the other ranks first
        text = str(error).rstrip(".")
        raise EffAdamError(
            f"Rank {rank}, {name}: {text}. Another rank has ended, failed, or cannot be reached: see "
            "its output, and restart all ranks."
        ) from error
    finally:
        _current.phase = outer


def finish(work: dist.Work | None, is_on_host: bool = True) -> None:
    """Wait for a collective within the current phase.

    Args:
        work: The collective; None on a rank that takes no part.
        is_on_host: Whether ``work.wait`` blocks until the result is there. On other devices than
            the CPU it only orders streams.

    Raises:
        EffAdamError: If the exchange has stopped meanwhile.
        RuntimeError: If the collective has failed.
    """
    current = _current.phase
    is_useful = current.goes_on if current is not None else lambda: True
    if work is None:
        return
    while not is_on_host and not work.is_completed():
        if not is_useful():
            raise EffAdamError("the exchange has stopped.")
        time.sleep(_POLL_S)
    if not wait_while(work, is_useful):
        raise EffAdamError("the exchange has stopped.")


def gather_bytes(data: bytes, group: Group, device: torch.device, everywhere: bool) -> list[bytes]:
    """Gather the bytes of every rank; a collective operation.

    Args:
        data: The bytes of this rank, of any length.
        group: The process group.
        device: A device whose tensors the group's backend can send.
        everywhere: Whether every rank gets the result, or only rank 0 of the group.

    Returns:
        The bytes of all ranks, in rank order; an empty list on ranks that do not get the result.
    """
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = torch.empty(group.size(), dtype=torch.int64, device=device)
    is_on_host = device.type == "cpu"
    finish(all_gather_flat(lengths, length, group), is_on_host)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    receives = everywhere or group.rank() == 0
    rows = torch.empty(group.size() if receives else 0, longest, dtype=torch.uint8, device=device)
    if everywhere:
        finish(all_gather_flat(rows.view(-1), padded.to(device), group), is_on_host)
    else:
        out = list(rows.unbind(0)) if receives else None
        finish(gather_to_first(padded.to(device), out, group), is_on_host)
    sizes = lengths.tolist()[: len(rows)]
    return [row[:size].numpy().tobytes() for row, size in zip(rows.cpu(), sizes, strict=True)]
