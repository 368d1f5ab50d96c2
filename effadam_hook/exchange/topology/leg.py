"""One collective of an exchange, as the busiest links carry it: numbers, no torch.

A node's network card is shared by all of its ranks. A rank also has a link to the other ranks of its
node, such as NVLink or the loopback interface, which is not shared.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Leg", "Load"]


@dataclass(frozen=True)
class Load:
    """Describe what an exchange of one bucket carries, and between whom.

    Attributes:
        bucket_bytes: Bytes of the gradients.
        payload_bytes: Bytes of a whole payload.
        nodes: Number M of nodes.
        ranks_per_node: Number G of ranks of a node. Ranks of a node have consecutive numbers.
        on_nccl: Whether NCCL carries the bytes: a broadcast sends them once rather than once a round,
            and ranks of a node send their gradients instead of reading them from shared memory.
    """

    bucket_bytes: float
    payload_bytes: float
    nodes: int
    ranks_per_node: int = 1
    on_nccl: bool = False

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.ranks_per_node

    def around_ring(self, name: str, size_bytes: float, rounds: int, messages: int = 0) -> Leg:
        """Make the leg of a ring: consecutive ranks, so that each card is crossed once a direction.

        Args:
            name: See :class:`Leg`.
            size_bytes: Bytes that every rank passes to the next one.
            rounds: See :class:`Leg`.
            messages: See :class:`Leg`.
        """
        card = size_bytes if self.nodes > 1 else 0.0
        inside = size_bytes if self.ranks_per_node > 1 else 0.0
        return Leg(name, card, card, rounds, messages, inside)


@dataclass(frozen=True)
class Leg:
    """One collective, as the busiest links carry it.

    Attributes:
        name: Key of the leg in the probe, and in the slowdowns of the planner's link.
        out_bytes: Payload bytes that leave the busiest node through its card.
        in_bytes: Payload bytes that arrive there.
        rounds: Number of messages that must follow one another.
        messages: Number of further messages that the busiest rank sends or receives at the same
            time.
        inside_bytes: Payload bytes, in the busier direction, between the busiest rank and the other
            ranks of its node.
    """

    name: str
    out_bytes: float
    in_bytes: float
    rounds: int
    messages: int = 0
    inside_bytes: float = 0.0

    @property
    def busiest_bytes(self) -> float:
        """Payload bytes on the busiest card, in the busier direction."""
        return max(self.out_bytes, self.in_bytes)

    @property
    def size_bytes(self) -> float:
        """Payload bytes on the card or inside the node, whichever are more."""
        return max(self.busiest_bytes, self.inside_bytes)
