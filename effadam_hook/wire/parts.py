"""Parts of a large bucket, which are exchanged one after the other. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["cut", "part_numel"]

PART_NUMEL = 1 << 19
"""Two megabytes of float32: a transfer of some milliseconds, longer than a collective's latency."""


def part_numel(world_size: int) -> int:
    """Return the number of elements from which a part is worth its overhead, where parts overlap.

    Args:
        world_size: Number of ranks. With more than 8 of them, parts grow so that the share of each rank
            keeps its size.
    """
    return PART_NUMEL * max(1, world_size // 8)


def cut(numels: Sequence[int], least: int | None) -> list[slice]:
    """Cut a bucket between parameters into parts.

    Args:
        numels: Number of elements of each parameter, in the bucket's order.
        least: Number of elements from which a part is complete; None leaves one part.

    Returns:
        The parameters of each part. A remainder of less than half a part belongs to the last part.
    """
    starts, here, left = [0], 0, sum(numels)
    for index, numel in enumerate(numels):
        if least is not None and here >= least and 2 * left >= least:
            starts.append(index)
            here = 0
        here += numel
        left -= numel
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(numels)], strict=True)]
