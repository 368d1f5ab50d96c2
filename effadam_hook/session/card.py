"""Bytes that a step sends through the network card of a node, from the payloads of its buckets.

They follow from the layouts of the buckets and the collectives of a topology, as in the cost model, and
are not measured. Rings are assumed to pass consecutive ranks.
"""

from __future__ import annotations

import logging

from effadam_hook.exchange.collectives import backend_of
from effadam_hook.exchange.topology import HIERARCHICAL, TOPOLOGIES, Load, Topology
from effadam_hook.session.session import ExchangeSession
from effadam_hook.wire.counters import human_bytes

__all__ = ["CardAdvice", "card_bytes", "describe_card"]

_log = logging.getLogger(__name__)


def card_bytes(session: ExchangeSession, kind: type[Topology]) -> float:
    """Return the bytes of a compressed step through the busiest card, in its busier direction.

    Args:
        session: The session, after its first compressed step.
        kind: The topology; another one than the session's is computed for the same payloads.

    Returns:
        Bytes; 0 before the first compressed step, on one node, and where nodes are unknown or have
        unequal numbers of ranks.
    """
    table = session.connection.choice.table
    if table is None or not table.is_even or len(table.nodes) == 1:
        return 0.0
    layouts = [buffers.layout for buffers in session.buckets]
    payloads = {
        "up": sum(layout.uplink.payload_bytes for layout in layouts),
        "down": sum(layout.downlink.payload_bytes for layout in layouts),
    }
    on_nccl = backend_of(session.group, session.parameters.device()) == "nccl"
    legs = [
        leg
        for direction, size in payloads.items()
        for leg in kind.legs(Load(0.0, size, len(table.nodes), table.ranks_per_node, on_nccl))
        if leg.name.startswith(direction)
    ]
    return max(sum(leg.out_bytes for leg in legs), sum(leg.in_bytes for leg in legs))


def describe_card(session: ExchangeSession) -> str:
    """Describe the bytes through a card, beside those of a dense all-reduce; empty if unknown.

    Args:
        session: The session.
    """
    size = card_bytes(session, type(session.topology)) if session.buckets else 0.0
    if not size:
        return ""
    ranks = session.group.size()
    held = sum(one.bucket.numel() * one.bucket.element_size() for one in session.buckets)
    dense = 2 * held * (ranks - 1) / ranks
    through = f"about {human_bytes(size)} a step through a node's card"
    return f"{through}, dense {human_bytes(dense)}: {dense / size:.2f}x less"


class CardAdvice:
    """Log what "hierarchical" would send, where a flat topology runs on nodes with several ranks."""

    def __init__(self) -> None:
        self._is_over = False

    def log_once(self, session: ExchangeSession) -> None:
        """Log on rank 0, after the first compressed step; see the class.

        Args:
            session: The session.
        """
        if self._is_over or not session.buckets:
            return
        self._is_over = True
        table, topology = session.connection.choice.table, session.topology
        if table is None or table.ranks_per_node == 1 or session.group.rank() > 0:
            return
        flat = card_bytes(session, type(topology))
        if not flat or topology.shares > 1 or session.mode.undivided:
            return
        other = card_bytes(session, TOPOLOGIES[HIERARCHICAL])
        _log.info(
            'topology="%s" sends about %s a step through the card of a node with %d ranks; '
            'topology="%s" would send %s, %.2fx less.',
            *(topology.name, human_bytes(flat), table.ranks_per_node),
            *(HIERARCHICAL, human_bytes(other), flat / other),
        )
