"""The nodes of a process group and the ranks of each, the same table on every rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["NodeTable"]

_MOST_SHOWN = 8


@dataclass(frozen=True)
class NodeTable:
    """The ranks of each node.

    Attributes:
        nodes: Ranks in the process group, ascending, for each node. Nodes are in the order of their
            first ranks.
        source: The knowledge from which nodes were found, for messages.
        hosts: Name of the host of each rank, for messages; may be empty.
    """

    nodes: tuple[tuple[int, ...], ...]
    source: str = ""
    hosts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, nodes: Sequence[Sequence[int]], source: str = "", hosts: Sequence[str] = ()
    ) -> NodeTable:
        """Make a table from the ranks of each node, in any order."""
        return cls(tuple(sorted(tuple(sorted(ranks)) for ranks in nodes)), source, tuple(hosts))

    @property
    def is_even(self) -> bool:
        """Return whether all nodes have the same number of ranks."""
        return len({len(ranks) for ranks in self.nodes}) == 1

    @property
    def ranks_per_node(self) -> int:
        """Number G of ranks of a node: of the largest one, unless the table is even."""
        return max(len(ranks) for ranks in self.nodes)

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
        """Return the ranks with the same index as a rank, one for each node of an even table."""
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
        """Describe the table in a few words, such as ``2 nodes x 4 ranks, by host``."""
        count, ranks = len(self.nodes), self.ranks_per_node
        text = f"{_count(count, 'node')} x {_count(ranks, 'rank')}"
        if not self.is_even:
            sizes = [str(len(ranks)) for ranks in self.nodes]
            more = ", ..." if count > _MOST_SHOWN else ""
            text = f"{_count(count, 'node')} with {', '.join(sizes[:_MOST_SHOWN])}{more} ranks"
        return f"{text}, by {self.source}" if self.source else text

    def list_nodes(self) -> str:
        """Describe every node with its host and its ranks, or the first ones of many."""
        lines = []
        for ranks in self.nodes[:_MOST_SHOWN]:
            name = f"{self.hosts[ranks[0]]!r}" if self.hosts else "a node"
            lines.append(f"{name} has {_count(len(ranks), 'rank')} ({list_ranks(ranks)})")
        more = len(self.nodes) - _MOST_SHOWN
        return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def list_ranks(ranks: Sequence[int]) -> str:
    """List ranks for messages, or the first ones of many."""
    more = ", ..." if len(ranks) > _MOST_SHOWN else ""
    return ", ".join(map(str, ranks[:_MOST_SHOWN])) + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
