"""Shares of the servers in a parameter. Integers only, no torch.

The blocks of a parameter are divided among the servers in contiguous runs. A share depends on the
parameter's name and size and on the number of servers, and on nothing else: when DDP rebuilds its
buckets, every server keeps its elements.
"""

from __future__ import annotations

import zlib

__all__ = ["share_of", "turn_of"]


def share_of(numel: int, turn: int, block_size: int, server: int, servers: int) -> tuple[int, int]:
    """Return the contiguous run of a parameter's elements that a server is responsible for.

    Runs consist of whole blocks and differ by at most one block. ``turn`` rotates the assignment, so
    that the extra blocks of many parameters spread over all servers.

    Args:
        numel: Number of elements of the parameter.
        turn: Rotation of the parameter, see :func:`turn_of`.
        block_size: Number of elements of a full block.
        server: Index of the server, from 0.
        servers: Number of servers.

    Returns:
        The first element, and the number of elements, which may be 0.
    """
    blocks = -(-numel // block_size)
    position = (server - turn) % servers
    first = position * blocks // servers * block_size
    last = min((position + 1) * blocks // servers * block_size, numel)
    return first, max(0, last - first)


def turn_of(name: str) -> int:
    """Return the rotation of a parameter, which is independent of its position in the model.

    Args:
        name: Canonical name of the parameter.

    Returns:
        The CRC-32 of the name.
    """
    return zlib.crc32(name.encode())
