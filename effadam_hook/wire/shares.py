"""Shares of the servers in a parameter. Integers only, no torch.

A parameter is divided among the servers in contiguous runs of whole units. A unit is a block, and 16
elements of an exact parameter, which has no scales: all chunks of a payload are as long as the longest
one, and a bias of a few blocks would lengthen those of a few servers only. A share depends on the
parameter's name, size and unit and on the number of servers, and on nothing else: when DDP rebuilds its
buckets, every server keeps its elements.
"""

from __future__ import annotations

import zlib

__all__ = ["share_of", "turn_of", "unit_of"]

_EXACT_UNIT = 16
"""64 bytes of float32, one line of a cache."""


def unit_of(exact: bool, block_size: int) -> int:
    """Return the number of elements of a unit of a parameter.

    Args:
        exact: Whether the parameter is sent uncompressed.
        block_size: Number of elements of a full block.
    """
    return min(_EXACT_UNIT, block_size) if exact else block_size


def share_of(numel: int, turn: int, unit: int, server: int, servers: int) -> tuple[int, int]:
    """Return the contiguous run of a parameter's elements that a server is responsible for.

    Runs consist of whole units and differ by at most one unit. ``turn`` rotates the assignment, so
    that the extra units of many parameters spread over all servers.

    Args:
        numel: Number of elements of the parameter.
        turn: Rotation of the parameter, see :func:`turn_of`.
        unit: Number of elements of a unit, see :func:`unit_of`.
        server: Index of the server, from 0.
        servers: Number of servers.

    Returns:
        The first element, and the number of elements, which may be 0.
    """
    units = -(-numel // unit)
    position = (server - turn) % servers
    first = position * units // servers * unit
    last = min((position + 1) * units // servers * unit, numel)
    return first, max(0, last - first)


def turn_of(name: str) -> int:
    """Return the rotation of a parameter, which is independent of its position in the model.

    Args:
        name: Canonical name of the parameter.

    Returns:
        The CRC-32 of the name.
    """
    return zlib.crc32(name.encode())
