"""The rule of ``topology="auto"``: hierarchical where nodes have several ranks, else sharded.

Nothing is measured. The ranks of a node share its network card, which "hierarchical" crosses once for
each element and a flat topology once for each rank. With one rank a node the two are the same
exchange. "sharded" gives the bits of "rank0", and divides the work of its one server among all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from effadam_hook.exchange.topology.hierarchical import Hierarchical
from effadam_hook.exchange.topology.node_table import NodeTable
from effadam_hook.exchange.topology.sharded import Sharded

__all__ = ["Choice", "choose_topology", "describe_obstacle"]


@dataclass(frozen=True)
class Choice:
    """A topology with the reason for it.

    Attributes:
        name: Public name of the topology.
        reason: The reason, as the end of a sentence.
    """

    name: str
    reason: str


def describe_obstacle(table: NodeTable) -> str:
    """Describe the reason for which "hierarchical" cannot serve these nodes.

    Args:
        table: The nodes.

    Returns:
        The reason, with the nodes' names; empty if it can serve them.
    """
    if not table.is_even:
        return f"The nodes have unequal numbers of ranks: {table.list_nodes()}."
    if len(table.nodes) == 1 and table.ranks_per_node > 1:
        return f"All ranks are on one node: {table.list_nodes()}."
    return ""


def choose_topology(table: NodeTable | None, undivided: str = "") -> Choice:
    """Choose a topology by the rule.

    Args:
        table: The nodes; None if they are unknown.
        undivided: The option that needs a whole bucket on every rank; empty without one.

    Returns:
        The choice, the same on all ranks if the arguments are.
    """
    if table is None:
        return Choice(Sharded.name, "the nodes are unknown")
    ranks = table.ranks_per_node
    if ranks == 1:
        return Choice(Sharded.name, "every node has one rank")
    if len(table.nodes) == 1:
        return Choice(Sharded.name, "all ranks are on one node")
    if not table.is_even:
        return Choice(Sharded.name, "the nodes have unequal numbers of ranks")
    if undivided:
        return Choice(
            Sharded.name,
            f"nodes have {ranks} ranks, and {undivided} does not work with {Hierarchical.name}",
        )
    return Choice(Hierarchical.name, f"nodes have {ranks} ranks, which share a network card")
