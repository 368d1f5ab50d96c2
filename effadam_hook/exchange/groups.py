"""Two Gloo groups for an exchange, and used again by the next one when it has ended well.

A process may train many models one after the other. Groups of its own for each of them would pile up:
torch cannot make a Gloo group again after it was destroyed (see :func:`new_group_like`), so that they
live until ``destroy_process_group()`` ends everything. Which pair is free everywhere is agreed on by
all ranks, as an exchange may have ended on some of them only.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from effadam_hook.exchange.compat import new_group_like

__all__ = ["GroupPair", "borrow_groups"]


@dataclass(eq=False)
class GroupPair:
    """The groups of the lanes "up" and "across".

    Attributes:
        up: For uplinks.
        down: For downlinks.
        is_free: Whether nothing is under way in them on this rank, nor will be.
    """

    up: dist.ProcessGroup
    down: dist.ProcessGroup
    is_free: bool = False


_pairs: weakref.WeakKeyDictionary[dist.ProcessGroup, list[GroupPair]] = weakref.WeakKeyDictionary()


def borrow_groups(group: dist.ProcessGroup) -> GroupPair:
    """A pair of groups with the ranks and the time-out of a group; a collective operation.

    Args:
        group: The process group.

    Returns:
        A pair; to be given back by setting :attr:`GroupPair.is_free`.
    """
    pairs = _pairs.setdefault(group, [])
    if pairs:
        free = torch.tensor([pair.is_free for pair in pairs], dtype=torch.int32)
        dist.all_reduce(free, op=dist.ReduceOp.MIN, group=group)
        for pair, is_free_everywhere in zip(pairs, free.tolist(), strict=True):
            if is_free_everywhere:
                pair.is_free = False
                return pair
    pairs.append(GroupPair(new_group_like(group), new_group_like(group)))
    return pairs[-1]
