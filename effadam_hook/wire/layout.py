"""Where every element of a bucket lies in the payloads that carry it. Integers only, no torch.

A *bucket* is DDP's flat buffer with one *slot* per parameter. Every parameter is cut into blocks from
its own first element, so no block straddles two parameters, and the blocks of a parameter are dealt
to the servers in contiguous runs, the same runs in whatever bucket the parameter turns up: when DDP
rebuilds its buckets, nothing changes hands. What one server gets of one bucket is a *chunk*, made of
*pieces*, at most one per parameter::

    bucket    | weight.0 ............ | bias.0 | weight.1 ............ |
    pieces    | server 0 | server 1 |  s 0    | server 1  | server 0 |      (two servers)

    chunk     | raw elements | scales | codes | padding | seal |
    payload   | chunk of server 0 | chunk of server 1 |

With one server (topology "rank0") there is one chunk and the pieces are whole parameters. Chunks have
a common stride, so a payload is a ``[servers, stride_bytes]`` matrix of bytes and what a server has
gathered is ``[world_size, stride_bytes]``.

Raw elements (exact parameters, or all of them with the quantizer ``none``) travel in the bucket's own
dtype and come first, where they are aligned; then two bytes of scale per block; then the codes. The
seal, at the end of the stride, is the exchange's: with it the ranks see that they mean the same.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from effadam_hook.wire.quantizers import SCALE_BYTES, Quantizer

__all__ = [
    "REPLICA_CHECK_BYTES",
    "BucketLayout",
    "Chunk",
    "Piece",
    "Slot",
    "Wire",
    "aligned",
    "cut",
    "lay_out_bucket",
    "part_numel",
    "share_of",
    "turn_of",
]

_ALIGN_BYTES = 8
REPLICA_CHECK_BYTES = 16
"""Bytes at the end of a chunk that the kernels leave alone."""


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket.

    Attributes:
        name: The parameter's name, its identity across buckets and runs.
        start: First element in the bucket.
        numel: Number of elements.
        exact: Whether it travels uncompressed.
    """

    name: str
    start: int
    numel: int
    exact: bool


@dataclass(frozen=True)
class Piece:
    """One server's share of one parameter, in one direction.

    Attributes:
        slot: Index of the parameter's slot.
        offset: First element in the parameter.
        start: First element in the bucket.
        local: First element in the server's chunk.
        numel: Number of elements; all but the last block are full.
        raw: Whether the elements travel as they are.
        scales_at: Byte in the chunk of the first scale (quantized pieces).
        data_at: Byte in the chunk of the first code, or of the first raw element.
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
        """What compiled kernels know of a piece, in their order."""
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
    """What one server holds of a bucket.

    Attributes:
        numel: Number of elements.
        pieces: Its pieces, in the order of the bucket's slots.
        used_bytes: Bytes before the padding.
    """

    numel: int
    pieces: tuple[Piece, ...]
    used_bytes: int


@dataclass(frozen=True, eq=False)
class Wire:
    """The layout of one direction's payload.

    Attributes:
        quantizer: What turns blocks into codes.
        scale_rule: How a block finds its scale.
        block_size: Elements that share a scale.
        itemsize: Bytes of a raw element.
        chunks: One per server.
        stride_bytes: Bytes from one chunk to the next in a payload.
    """

    quantizer: Quantizer
    scale_rule: str
    block_size: int
    itemsize: int
    chunks: tuple[Chunk, ...]
    stride_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of a whole payload, padding included."""
        return len(self.chunks) * self.stride_bytes

    @cached_property
    def numel(self) -> int:
        """Elements of the bucket."""
        return sum(chunk.numel for chunk in self.chunks)

    @cached_property
    def slot_numels(self) -> tuple[int, ...]:
        """Elements of each slot's parameter, up to the last slot that has any."""
        pieces = [piece for chunk in self.chunks for piece in chunk.pieces]
        numels = [0] * (1 + max((piece.slot for piece in pieces), default=-1))
        for piece in pieces:
            numels[piece.slot] += piece.numel
        return tuple(numels)

    def as_raw(self) -> Wire:
        """The same chunks uncompressed: every element raw, in the chunk's order, from byte 0."""
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
        """Per chunk, eight 64-bit integers a piece, in the order of :meth:`Piece.row`."""
        return tuple(
            array("q", (value for piece in chunk.pieces for value in piece.row()))
            for chunk in self.chunks
        )


@dataclass(frozen=True, eq=False)
class BucketLayout:
    """A bucket's slots and the wires of both directions.

    Attributes:
        slots: The parameters, in the bucket's order.
        numel: Elements of the bucket.
        uplink: From workers to servers.
        downlink: From servers to workers. Its pieces pair with the uplink's.
    """

    slots: tuple[Slot, ...]
    numel: int
    uplink: Wire
    downlink: Wire


def share_of(numel: int, turn: int, block_size: int, server: int, servers: int) -> tuple[int, int]:
    """The contiguous run of a parameter's elements that a server is responsible for.

    Depends on nothing but the parameter and the number of servers. Runs are whole blocks and differ
    by at most one block; ``turn`` turns the assignment, so that odd blocks spread over the servers.

    Args:
        numel: Elements of the parameter.
        turn: Any whole number that belongs to the parameter, see :func:`turn_of`.
        block_size: Elements of a full block.
        server: Which server, from 0.
        servers: How many there are.

    Returns:
        First element and number of elements, the latter possibly 0.
    """
    blocks = -(-numel // block_size)
    position = (server - turn) % servers
    first = position * blocks // servers * block_size
    last = min((position + 1) * blocks // servers * block_size, numel)
    return first, max(0, last - first)


def turn_of(name: str) -> int:
    """A number that belongs to a parameter wherever it stands in the model.

    Args:
        name: The parameter's canonical name.

    Returns:
        The CRC-32 of the name.
    """
    return zlib.crc32(name.encode())


PART_NUMEL = 1 << 19
"""Two megabytes of float32: some milliseconds on the wire, where a collective costs less than one."""


def part_numel(world_size: int) -> int:
    """Elements that make a part of a bucket worth its overhead, where parts overlap.

    Args:
        world_size: Number of ranks. With more of them every peer's share of a part is smaller.
    """
    return PART_NUMEL * max(1, world_size // 8)


def cut(numels: Sequence[int], least: int | None) -> list[slice]:
    """Cut a bucket between parameters into parts that can be exchanged one after the other.

    Args:
        numels: Elements of each parameter, in the bucket's order.
        least: A part is complete as soon as it has so many elements; None leaves one part.

    Returns:
        Which parameters make up each part. A remainder of less than half a part stays with the last.
    """
    starts, here, left = [0], 0, sum(numels)
    for index, numel in enumerate(numels):
        if least is not None and here >= least and 2 * left >= least:
            starts.append(index)
            here = 0
        here += numel
        left -= numel
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(numels)], strict=True)]


def lay_out_bucket(
    slots: Sequence[Slot],
    *,
    uplink: Quantizer,
    downlink: Quantizer,
    scale_rule: str,
    block_size: int,
    servers: int,
    itemsize: int,
) -> BucketLayout:
    """Lay out both directions of a bucket.

    Args:
        slots: The parameters in the bucket's order, without gaps.
        uplink: Quantizer from workers to servers.
        downlink: Quantizer from servers to workers.
        scale_rule: How a block finds its scale.
        block_size: Elements of a full block.
        servers: Number of servers.
        itemsize: Bytes of one element of the bucket.

    Returns:
        The layout; the same for the same arguments on every rank.

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
            _lay_out_chunk(slots, quantizer, block_size, server, servers, itemsize)
            for server in range(servers)
        )
        longest = max(chunk.used_bytes for chunk in chunks)
        stride = aligned(longest) + REPLICA_CHECK_BYTES
        return Wire(quantizer, scale_rule, block_size, itemsize, chunks, stride)

    return BucketLayout(tuple(slots), expected, wire(uplink), wire(downlink))


def aligned(size_bytes: int) -> int:
    """The size with the padding that keeps what follows it aligned."""
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _lay_out_chunk(
    slots: Sequence[Slot],
    quantizer: Quantizer,
    block_size: int,
    server: int,
    servers: int,
    itemsize: int,
) -> Chunk:
    shares: list[tuple[int, int, int, int, int, bool]] = []
    local = raw_bytes = scale_bytes = 0
    for index, slot in enumerate(slots):
        first, numel = share_of(slot.numel, turn_of(slot.name), block_size, server, servers)
        if numel == 0:
            continue
        raw = slot.exact or quantizer.is_raw
        shares.append((index, first, slot.start + first, local, numel, raw))
        local += numel
        if raw:
            raw_bytes += numel * itemsize
        else:
            scale_bytes += -(-numel // block_size) * SCALE_BYTES

    raw_at = 0
    # Raw elements of 2 bytes may end anywhere even, so scales stay aligned to their own size.
    scales_at = raw_bytes
    codes_at = raw_bytes + scale_bytes
    pieces: list[Piece] = []
    for index, first, start, local_start, numel, raw in shares:
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
