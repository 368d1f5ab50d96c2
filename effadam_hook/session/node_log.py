"""Description of how the ranks of a node exchange gradients, with the reason: summary and log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from effadam_hook.session.node_buffers import NodeBuffers
from effadam_hook.session.session import ExchangeSession

__all__ = ["NodeLog", "describe_inside"]

_log = logging.getLogger(__name__)


def describe_inside(session: ExchangeSession) -> str:
    """Describe how the ranks of a node exchange the buckets of a model.

    Args:
        session: The session.

    Returns:
        Shared memory, or collectives with the reason; empty in topologies without nodes, and while
        ranks find out.
    """
    return describe_exchange([one.node for one in session.buckets if one.node is not None])


def describe_exchange(nodes: Sequence[NodeBuffers]) -> str:
    """Describe how the ranks of a node exchange buckets; see :func:`describe_inside`.

    Args:
        nodes: The buffers of each bucket.
    """
    others = [node for node in nodes if not node.is_shared]
    if not nodes or any(node.refusal == "" for node in others):
        return ""
    if not others:
        return "through shared memory"
    which = "" if len(others) == len(nodes) else f", {len(others)} of {len(nodes)} buckets"
    reasons = dict.fromkeys(node.refusal for node in others)
    return f"by collectives{which}: {'; '.join(reasons)}"


class NodeLog:
    """Log once, on the first rank of each node, how its ranks exchange gradients."""

    def __init__(self) -> None:
        self._is_over = False

    def log_once(self, session: ExchangeSession) -> None:
        """Log as soon as it is known; called after a compressed step.

        Args:
            session: The session.
        """
        if self._is_over:
            return
        topology = session.topology
        if topology.shares == 1 or topology.share > 0:
            self._is_over = True
        elif found := describe_inside(session):
            self._is_over = True
            _log.info("The ranks of this node exchange gradients %s.", found)
