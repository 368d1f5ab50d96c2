"""Positions of a wire's tiles on the device, made once for each wire."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from effadam_hook.kernels.triton_kernels.constants import blocks_of
from effadam_hook.wire.layout import Chunk, Wire

__all__ = ["Table", "table_of"]

COLUMNS = 9
"""Columns of :attr:`Table.pieces`."""


@dataclass(frozen=True)
class Table:
    """Positions of the tiles of a wire, or of one of its chunks.

    Attributes:
        tiles: Number of programs.
        owner: ``[tiles]`` int32, the index of each tile's piece.
        pieces: ``[pieces, 9]`` int64: the columns of ``Piece.row()`` and the piece's first tile.
    """

    tiles: int
    owner: Tensor
    pieces: Tensor


_tables: WeakKeyDictionary[Wire, dict[tuple[torch.device, int], Table]] = WeakKeyDictionary()


def table_of(wire: Wire, device: torch.device, server: int | None) -> Table:
    """Return the table of one chunk, or of all chunks in the order of a payload.

    Args:
        wire: The wire.
        device: Device of the table.
        server: Index of the chunk; None for all.

    Returns:
        The table; calls with the same arguments return the same one.
    """
    tables = _tables.setdefault(wire, {})
    key = (device, -1 if server is None else server)
    if key not in tables:
        whole = [(chunk, i * wire.stride_bytes) for i, chunk in enumerate(wire.chunks)]
        chunks = whole if server is None else [(wire.chunks[server], 0)]
        tables[key] = _make_table(wire, chunks, device)
    return tables[key]


def _make_table(wire: Wire, chunks: list[tuple[Chunk, int]], device: torch.device) -> Table:
    tile = wire.block_size * blocks_of(wire)
    rows: list[tuple[int, ...]] = []
    counts: list[int] = []
    tiles = 0
    for chunk, shift in chunks:
        for piece in chunk.pieces:
            start, local, numel, raw, scales_at, data_at, slot, offset = piece.row()
            at = (scales_at + shift, data_at + shift)
            rows.append((start, local, numel, raw, *at, slot, offset, tiles))
            counts.append(-(-numel // tile))
            tiles += counts[-1]
    # On the CPU, whatever the default device is.
    owner = torch.repeat_interleave(
        torch.arange(len(counts), dtype=torch.int32, device="cpu"),
        torch.tensor(counts, dtype=torch.int64, device="cpu"),
    )
    pieces = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, COLUMNS)
    return Table(tiles, owner.to(device), pieces.to(device))
