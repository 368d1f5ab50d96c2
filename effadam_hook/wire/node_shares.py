"""Shares of the ranks of a node in a parameter. Integers only, no torch.

With M nodes of G ranks, the units of a parameter are first divided among the G local ranks in
contiguous runs, and each of these runs among the M nodes. Server ``g * M + m`` is local rank g of
node m: the servers of one local rank are consecutive, and so are their elements. With G = 1 these
are the shares of :func:`~effadam_hook.wire.shares.share_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

from effadam_hook.wire.shares import turn_of, unit_of

__all__ = ["NodeShare", "node_share_of", "position_of"]


def position_of(server: int, turn: int, servers: int, shares: int) -> int:
    """Return the place of a server's run among the runs of a parameter.

    Args:
        server: Index of the server, from 0.
        turn: Rotation of the parameter, see :func:`~effadam_hook.wire.shares.turn_of`.
        servers: Number of servers, a multiple of ``shares``.
        shares: Number G of ranks of a node.

    Returns:
        The place, from 0; a permutation of the servers.
    """
    peers = servers // shares
    share, peer = divmod(server, peers)
    return (share - turn) % shares * peers + (peer - turn // shares) % peers


def node_share_of(
    numel: int, turn: int, unit: int, share: int, shares: int, servers: int
) -> tuple[int, int]:
    """Return the contiguous run of a parameter's elements that a local rank sums over its node.

    It is the union of the runs of the servers ``share * M`` to ``share * M + M - 1``.

    Args:
        numel: Number of elements of the parameter.
        turn: Rotation of the parameter, see :func:`~effadam_hook.wire.shares.turn_of`.
        unit: Number of elements of a unit, see :func:`~effadam_hook.wire.shares.unit_of`.
        share: Index of the rank in its node, from 0.
        shares: Number G of ranks of a node.
        servers: Number of servers, M * G.

    Returns:
        The first element, and the number of elements, which may be 0.
    """
    units, peers = -(-numel // unit), servers // shares
    position = (share - turn) % shares * peers
    first = position * units // servers * unit
    last = min((position + peers) * units // servers * unit, numel)
    return first, max(0, last - first)


@dataclass(frozen=True)
class NodeShare:
    """The share of a rank of a node in every parameter.

    Attributes:
        share: Index of the rank in its node, from 0.
        shares: Number G of ranks of a node.
        servers: Number of servers, M * G.
        block_size: Number of elements of a full block.
        exact: Names of the parameters that are sent uncompressed.
    """

    share: int
    shares: int
    servers: int
    block_size: int
    exact: frozenset[str] = frozenset()

    def of(self, name: str, numel: int) -> tuple[int, int]:
        """Return the first element and the number of elements of the share in a parameter.

        Args:
            name: Canonical name of the parameter.
            numel: Its number of elements.
        """
        unit = unit_of(name in self.exact, self.block_size)
        return node_share_of(numel, turn_of(name), unit, self.share, self.shares, self.servers)
