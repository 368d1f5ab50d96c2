"""The times of the slowest rank, by which all ranks decide alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from effadam_hook.exchange.collectives import Group, all_reduce
from effadam_hook.exchange.waiting import finish

__all__ = ["slowest"]


def slowest(seconds: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """Return the maximum of each number over all ranks; a collective operation.

    Args:
        seconds: The numbers of this rank.
        group: The process group.
        device: A device whose tensors the group's backend can send.

    Returns:
        The same numbers on every rank.
    """
    values = torch.tensor(seconds, dtype=torch.float64, device=device)
    finish(all_reduce(values, group, dist.ReduceOp.MAX), device.type == "cpu")
    largest: list[float] = values.tolist()
    return largest
