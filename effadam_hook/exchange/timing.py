"""Times on which all ranks agree, so that what is decided by them is decided alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from effadam_hook.exchange.collectives import Group, all_reduce
from effadam_hook.exchange.waiting import finish

__all__ = ["slowest"]


def slowest(seconds: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """The largest of each number over all ranks; a collective operation.

    Args:
        seconds: This rank's numbers.
        group: The process group.
        device: Where the group's backend wants tensors.

    Returns:
        The same numbers on every rank.
    """
    values = torch.tensor(seconds, dtype=torch.float64, device=device)
    finish(all_reduce(values, group, dist.ReduceOp.MAX), device.type == "cpu")
    largest: list[float] = values.tolist()
    return largest
