"""The nodes of a process group and the ranks of each, the same table on every rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["NodeTable"]


@dataclass(frozen=True)
class NodeTable:
    """The ranks of each node.

    Attributes:
        nodes: Ranks in the process group, ascending, for each node. Nodes are in the order of their
            first ranks; all have the same number of ranks.
        source: The knowledge from which nodes were found, for messages.
    """

    nodes: tuple[tuple[int, ...], ...]
    source: str = ""

    @classmethod
    def of(cls, nodes: Sequence[Sequence[int]], source: str = "") -> NodeTable:
        """Make a table from the ranks of each node, in any order."""
        return cls(tuple(sorted(tuple(sorted(ranks)) for ranks in nodes)), source)

    @property
    def ranks_per_node(self) -> int:
        """Number G of ranks of a node."""
        return len(self.nodes[0])

    def locate(self, rank: int) -> tuple[int, int]:
        """Return the index of a rank's node, and the rank's index in the node."""
        for node, ranks in enumerate(self.nodes):
            if rank in ranks:
                return node, ranks.index(rank)
        raise KeyError(rank)

    def node_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of a rank's node."""
        return self.nodes[self.locate(rank)[0]]

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks with the same index as a rank, one for each node."""
        index = self.locate(rank)[1]
        return tuple(ranks[index] for ranks in self.nodes)

    def name(self, ranks: Collection[int]) -> str:
        """Name ranks for people: a whole node as such, any other rank with its node."""
        names = []
        for node, members in enumerate(self.nodes):
            here = [str(rank) for rank in members if rank in ranks]
            if len(here) == len(members) > 1:
                names.append(f"node {node} (ranks {', '.join(here)})")
            elif here:
                names.append(f"rank {', '.join(here)} (on node {node})")
        return " and ".join(names)

    def describe(self) -> str:
        """Describe the table for people."""
        ranks = self.ranks_per_node
        text = f"{len(self.nodes)} nodes x {ranks} rank{'s' if ranks > 1 else ''}"
        return f"{text}, by {self.source}" if self.source else text
