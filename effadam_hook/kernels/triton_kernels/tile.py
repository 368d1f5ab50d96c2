"""Tiles of the Triton kernels: the blocks of one program, and the positions of their elements.

A tile has the shape ``[8, BLOCKS, COLS]``: the planes of the packing, the blocks, the columns. A thread
holds all planes of a few neighbouring columns. Packing a column then needs no exchange between threads,
a block is spread over few threads, and an access to memory is as wide as these columns. Positions in
a tile are 32-bit integers.

A tile is *full* if all of its blocks are and its elements are aligned to four. Everything that depends
on the length of a block is then known when the kernel is compiled, and no access has a mask.
"""

import triton
import triton.language as tl

__all__ = ["pointer_to", "positions"]


@triton.jit
def pointer_to(dtype: tl.constexpr, address):
    """Return an address as a pointer to elements of a floating dtype."""
    # Triton 3.0 and 3.1 make no pointer type of a dtype that is a constant.
    if dtype == tl.float64:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif dtype == tl.float32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif dtype == tl.float16:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    return pointer


@triton.jit
def positions(
    count,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
    PLANES: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return the positions of the elements of a tile of ``count`` elements.

    Returns:
        ``block [1, BLOCKS, 1]``, ``plane [8, 1, 1]``, ``column [1, 1, COLS]``; the number of elements
        and of columns of each block, ``[1, BLOCKS, 1]``; the position of each element in the tile,
        and whether it exists, ``[8, BLOCKS, COLS]``.
    """
    plane = tl.arange(0, 8)[:, None, None]
    block = tl.arange(0, BLOCKS)[None, :, None]
    column = tl.arange(0, COLS)[None, None, :]
    if FULL:
        numel = tl.full((1, BLOCKS, 1), SIZE, tl.int32)
    else:
        numel = tl.minimum(tl.maximum(count - block * SIZE, 0), SIZE)
    width = (numel + (PLANES - 1)) // PLANES
    inside = plane * width + column
    live = (column < width) & (inside < numel) & (plane < PLANES)
    # A thread must hold all planes. Triton before 3.7 spreads axes with longer runs over threads first,
    # so the blocks claim one of two. Only that of the last axis, the true one, determines accesses.
    i = tl.max_contiguous(block * SIZE + inside, [1, 2, COLS])
    return block, plane, column, numel, width, i, live
