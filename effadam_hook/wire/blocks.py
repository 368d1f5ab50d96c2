"""Block size by the rows of a model. Integers only, no torch.

Gradients of one row of a matrix (an output channel, a token of an embedding) have similar magnitudes,
and neighbouring rows may differ by orders of magnitude: a token that is absent from the batch has none.
A block that spans two rows has one scale for both. The rule weighs, in bits per element:

- the scales: 16 / B for blocks of B elements;
- blocks that span two rows: a quarter of a bit. With B = 256 and rows of 128 elements, the error of
  ``lloyd2`` is that of a quantizer with a quarter of a bit less (docs/algorithm.md).

Blocks follow one another through the whole parameter. A share of (B - gcd(B, R)) / R of them spans two
rows of R elements; it is zero if B divides R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["LARGEST_BLOCK", "SMALLEST_BLOCK", "USUAL_BLOCK", "block_size_for"]

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 4096
USUAL_BLOCK = 256
"""Block size for unknown rows, and the largest one that the rule chooses."""

_STEP = 8  # the planes of a block are full
_TILE_STEP = 32  # four neighbouring codes of a plane are one access of a GPU's thread
_SPANNING_BITS = 0.25


def block_size_for(rows: Sequence[tuple[int, int]]) -> int:
    """Return the block size for a model.

    Args:
        rows: Length of a row, and number of elements, of every quantized parameter with rows.

    Returns:
        A multiple of 8 from 16 to 256; 256 if there are no rows. It depends on the argument only, so
        that it is equal on all ranks.
    """
    total = sum(numel for _, numel in rows)
    if total == 0:
        return USUAL_BLOCK

    def bits(size: int) -> float:
        spanning = sum(numel * _spanning_share(size, row) for row, numel in rows) / total
        # Other sizes are slower on a GPU, and must save a thirty-second of a bit.
        odd = 1 / 32 if size % _TILE_STEP else 0.0
        return 16 / size + _SPANNING_BITS * spanning + odd

    return min(range(USUAL_BLOCK, SMALLEST_BLOCK - 1, -_STEP), key=bits)


def _spanning_share(size: int, row: int) -> float:
    return min(1.0, (size - math.gcd(size, row)) / row)
