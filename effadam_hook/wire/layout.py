"""Layout of a bucket in the payloads that carry it. Integers only, no torch.

A *bucket* is DDP's flat buffer with one *slot* per parameter. Every parameter is divided into
blocks from its own first element, so that no block straddles two parameters. The units of a
parameter, which are blocks where it is quantized, are divided among the servers in contiguous runs.
These are the same in every bucket that holds the parameter (:mod:`effadam_hook.wire.shares`). The part
of a bucket that belongs to one server is a *chunk*. It consists of *pieces*, at most one per
parameter::

    bucket    | weight.0 ............ | bias.0 | weight.1 ............ |
    pieces    | server 0 | server 1 |  s 0    | server 1  | server 0 |      (two servers)

    chunk     | raw elements | scales | codes | padding | replica check |
    payload   | chunk of server 0 | chunk of server 1 |

With one server (topology "rank0") there is one chunk, and the pieces are whole parameters. Chunks have
a common stride: a payload is a ``[servers, stride_bytes]`` matrix of bytes, and the payloads that a
server gathers form a ``[world_size, stride_bytes]`` matrix.

Raw elements (exact parameters, or all of them with the quantizer ``none``) have the dtype of the bucket
and come first, where they are aligned. Two bytes of scale per block follow, then the codes. The last
bytes of the stride belong to the exchange, which compares replicas with them
(:mod:`effadam_hook.exchange.replica_check`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from effadam_hook.wire.node_shares import position_of
from effadam_hook.wire.quantizers import SCALE_BYTES, Quantizer
from effadam_hook.wire.shares import share_of, turn_of, unit_of

__all__ = [
    "REPLICA_CHECK_BYTES",
    "BucketLayout",
    "Chunk",
    "Piece",
    "Slot",
    "Wire",
    "aligned",
    "lay_out_bucket",
]

_ALIGN_BYTES = 8
REPLICA_CHECK_BYTES = 16
"""Bytes at the end of a chunk that kernels neither read nor write."""


@dataclass(frozen=True)
class Slot:
    """Place of a parameter in a bucket.

    Attributes:
        name: Name of the parameter, its identity across buckets and runs.
        start: First element in the bucket.
        numel: Number of elements.
        exact: Whether the parameter is sent uncompressed.
    """

    name: str
    start: int
    numel: int
    exact: bool


@dataclass(frozen=True)
class Piece:
    """Share of one server in one parameter, in one direction.

    Attributes:
        slot: Index of the slot of the parameter.
        offset: First element in the parameter.
        start: First element in the bucket.
        local: First element in the server's chunk.
        numel: Number of elements; all but the last block are full.
        raw: Whether the elements are sent without quantization.
        scales_at: Offset of the first scale in the chunk, in bytes (quantized pieces).
        data_at: Offset of the first code, or of the first raw element, in the chunk, in bytes.
    """

    slot: int
    offset: int
    start: int
    local: int
    numel: int
    raw: bool
    scales_at: int
    data_at: int

    def row(self) -> tuple[int, int, int, int, int, int, int, int]:
        """Return the fields that compiled kernels read, in their order."""
        return (
            self.start,
            self.local,
            self.numel,
            int(self.raw),
            self.scales_at,
            self.data_at,
            self.slot,
            self.offset,
        )


@dataclass(frozen=True)
class Chunk:
    """Part of a bucket that belongs to one server.

    Attributes:
        numel: Number of elements.
        pieces: The pieces, in the order of the bucket's slots.
        used_bytes: Number of bytes before the padding.
    """

    numel: int
    pieces: tuple[Piece, ...]
    used_bytes: int


@dataclass(frozen=True, eq=False)
class Wire:
    """Layout of the payload of one direction.

    Attributes:
        quantizer: Quantizer of the blocks.
        scale_rule: Rule for the scale of a block.
        block_size: Number of elements that share a scale.
        itemsize: Size of a raw element in bytes.
        chunks: One chunk per server.
        stride_bytes: Distance between chunks in a payload, in bytes.
    """

    quantizer: Quantizer
    scale_rule: str
    block_size: int
    itemsize: int
    chunks: tuple[Chunk, ...]
    stride_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Return the size of a whole payload in bytes, padding included."""
        return len(self.chunks) * self.stride_bytes

    @cached_property
    def numel(self) -> int:
        """Return the number of elements of the bucket."""
        return sum(chunk.numel for chunk in self.chunks)

    @cached_property
    def slot_numels(self) -> tuple[int, ...]:
        """Return the number of elements of each slot, up to the last slot that has any."""
        pieces = [piece for chunk in self.chunks for piece in chunk.pieces]
        numels = [0] * (1 + max((piece.slot for piece in pieces), default=-1))
        for piece in pieces:
            numels[piece.slot] += piece.numel
        return tuple(numels)

    def as_raw(self) -> Wire:
        """Return the same chunks uncompressed: raw elements in the order of the chunk, from byte 0."""
        chunks = tuple(
            Chunk(
                chunk.numel,
                tuple(
                    replace(piece, raw=True, scales_at=0, data_at=piece.local * self.itemsize)
                    for piece in chunk.pieces
                ),
                chunk.numel * self.itemsize,
            )
            for chunk in self.chunks
        )
        stride = aligned(max(chunk.used_bytes for chunk in chunks))
        return replace(self, chunks=chunks, stride_bytes=stride)

    @cached_property
    def tables(self) -> tuple[array[int], ...]:
        """Return eight 64-bit integers per piece for each chunk, in the order of :meth:`Piece.row`."""
        return tuple(
            array("q", (value for piece in chunk.pieces for value in piece.row()))
            for chunk in self.chunks
        )


@dataclass(frozen=True, eq=False)
class BucketLayout:
    """Slots of a bucket, and the wires of both directions.

    Attributes:
        slots: The parameters, in the order of the bucket.
        numel: Number of elements of the bucket.
        uplink: Wire from workers to servers.
        downlink: Wire from servers to workers. Its pieces correspond to those of the uplink.
    """

    slots: tuple[Slot, ...]
    numel: int
    uplink: Wire
    downlink: Wire


def lay_out_bucket(
    slots: Sequence[Slot],
    *,
    uplink: Quantizer,
    downlink: Quantizer,
    scale_rule: str,
    block_size: int,
    servers: int,
    itemsize: int,
    shares: int = 1,
) -> BucketLayout:
    """Lay out both directions of a bucket.

    Args:
        slots: The parameters in the order of the bucket, without gaps.
        uplink: Quantizer from workers to servers.
        downlink: Quantizer from servers to workers.
        scale_rule: Rule for the scale of a block.
        block_size: Number of elements of a full block.
        servers: Number of servers.
        itemsize: Size of an element of the bucket in bytes.
        shares: Number of ranks of a node that divide the bucket among themselves, see
            :mod:`effadam_hook.wire.node_shares`.

    Returns:
        The layout. It depends on the arguments only, so that it is equal on all ranks.

    Raises:
        ValueError: If the slots leave gaps or overlap.
    """
    expected = 0
    for slot in slots:
        if slot.start != expected:
            raise ValueError(
                f"Slot of {slot.name!r} starts at element {slot.start}. Must be {expected}: "
                "slots follow one another without gaps."
            )
        expected += slot.numel

    def wire(quantizer: Quantizer) -> Wire:
        chunks = tuple(
            _lay_out_chunk(slots, quantizer, block_size, server, servers, itemsize, shares)
            for server in range(servers)
        )
        longest = max(chunk.used_bytes for chunk in chunks)
        stride = aligned(longest) + REPLICA_CHECK_BYTES
        return Wire(quantizer, scale_rule, block_size, itemsize, chunks, stride)

    return BucketLayout(tuple(slots), expected, wire(uplink), wire(downlink))


def aligned(size_bytes: int) -> int:
    """Return the size with the padding that aligns the following data."""
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _lay_out_chunk(
    slots: Sequence[Slot],
    quantizer: Quantizer,
    block_size: int,
    server: int,
    servers: int,
    itemsize: int,
    shares: int,
) -> Chunk:
    runs: list[tuple[int, int, int, int, int, bool]] = []
    local = raw_bytes = scale_bytes = 0
    for index, slot in enumerate(slots):
        position = position_of(server, turn_of(slot.name), servers, shares)
        unit = unit_of(slot.exact, block_size)
        first, numel = share_of(slot.numel, 0, unit, position, servers)
        if numel == 0:
            continue
        raw = slot.exact or quantizer.is_raw
        runs.append((index, first, slot.start + first, local, numel, raw))
        local += numel
        if raw:
            raw_bytes += numel * itemsize
        else:
            scale_bytes += -(-numel // block_size) * SCALE_BYTES

    raw_at = 0
    # Raw elements have 2 bytes or more, so that scales are aligned to their own size.
    scales_at = raw_bytes
    codes_at = raw_bytes + scale_bytes
    pieces: list[Piece] = []
    for index, first, start, local_start, numel, raw in runs:
        if raw:
            pieces.append(Piece(index, first, start, local_start, numel, True, 0, raw_at))
            raw_at += numel * itemsize
        else:
            pieces.append(
                Piece(index, first, start, local_start, numel, False, scales_at, codes_at)
            )
            full, rest = divmod(numel, block_size)
            scales_at += (full + (rest > 0)) * SCALE_BYTES
            codes_at += full * quantizer.code_bytes(block_size) + quantizer.code_bytes(rest)
    return Chunk(local, tuple(pieces), codes_at)
