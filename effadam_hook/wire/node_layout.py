"""The layout of the elements of a bucket that one rank of a node handles. Integers only, no torch.

A rank's share of a bucket is stored compactly, the runs of its parameters one after the other::

    bucket      | weight.0 ............ | bias.0 | weight.1 ............ |
    shares      | rank 0   | rank 1     |  r 0   | rank 1   | rank 0     |     (two ranks a node)
    rank 0      | weight.0 | bias.0 | weight.1 |

The uplink of a rank covers its share only. It has one chunk for each node: those of the bucket's uplink
that belong to the rank's servers, with positions in the compact share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from effadam_hook.wire.layout import BucketLayout, Chunk, Piece, Slot, Wire

__all__ = ["NodeLayout", "Run", "lay_out_node", "whole_runs"]


@dataclass(frozen=True)
class Run:
    """A rank's share of one parameter; all of it in topologies without nodes.

    Attributes:
        slot: Index of the parameter's slot.
        offset: First element in the parameter.
        start: First element in the bucket.
        local: First element in the compact share.
        numel: Number of elements.
    """

    slot: int
    offset: int
    start: int
    local: int
    numel: int


@dataclass(frozen=True, eq=False)
class NodeLayout:
    """A rank's share of a bucket.

    Attributes:
        runs: Its runs, in the order of the bucket's slots; at most one for each.
        numel: Number of elements.
        uplink: Chunks for the servers of the share. Pieces start in the compact share, and offsets
            count from the run's first element.
    """

    runs: tuple[Run, ...]
    numel: int
    uplink: Wire


def whole_runs(slots: Sequence[Slot]) -> tuple[Run, ...]:
    """Return the runs of a rank that encodes a whole bucket.

    Args:
        slots: The bucket's slots.
    """
    return tuple(
        Run(index, 0, slot.start, slot.start, slot.numel) for index, slot in enumerate(slots)
    )


def lay_out_node(layout: BucketLayout, shares: int) -> tuple[NodeLayout, ...]:
    """Lay out the shares of all ranks of a node.

    Args:
        layout: The bucket's layout, made for that number of shares.
        shares: Number of ranks of a node.

    Returns:
        One layout for each local rank.
    """
    chunks = layout.uplink.chunks
    peers = len(chunks) // shares
    return tuple(
        _lay_out_share(layout.uplink, chunks[share * peers : (share + 1) * peers])
        for share in range(shares)
    )


def _lay_out_share(uplink: Wire, chunks: Sequence[Chunk]) -> NodeLayout:
    by_slot: dict[int, list[Piece]] = {}
    for piece in (piece for chunk in chunks for piece in chunk.pieces):
        by_slot.setdefault(piece.slot, []).append(piece)
    runs: dict[int, Run] = {}
    local = 0
    for slot in sorted(by_slot):
        first = min(by_slot[slot], key=lambda piece: piece.offset)
        numel = sum(piece.numel for piece in by_slot[slot])
        runs[slot] = Run(slot, first.offset, first.start, local, numel)
        local += numel

    def rebased(piece: Piece) -> Piece:
        run = runs[piece.slot]
        offset = piece.offset - run.offset
        return replace(piece, offset=offset, start=run.local + offset)

    moved = tuple(replace(c, pieces=tuple(map(rebased, c.pieces))) for c in chunks)
    return NodeLayout(tuple(runs.values()), local, replace(uplink, chunks=moved))
