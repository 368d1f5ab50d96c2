"""Topology "sharded": every rank serves its share of every parameter.

An all-to-all sends the chunks to their servers. Each server reduces and quantizes its chunk, and
sends the result to all ranks. Blocks and the order of summation are those of "rank0", so the
results are the same to the bit. Only the traffic differs: every link carries equally much.

On Gloo the downlink takes one of two routes, with the same bytes on every link. *Around a ring* is
Gloo's all-gather: every link has one sender and one receiver at a time, which fills it best, but a
result is delayed N - 1 times by the latency. *Straight* is an all-to-all of N copies, which is
delayed once. The ring is some percent faster between near ranks, and takes twice as long between
ranks that are 20 ms apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.collectives import Group, all_gather_flat, all_to_all_flat
from effadam_hook.exchange.timing import slowest
from effadam_hook.exchange.topology.leg import Leg, Load
from effadam_hook.exchange.topology.topology import Topology
from effadam_hook.exchange.waiting import finish

__all__ = ["Sharded"]

_NEAR_S = 1e-3
"""Extra seconds per round in which the ring may be slower with empty messages: full ones gain more."""
_SURELY_NEAR, _SURELY_FAR = 1 / 4, 16.0
_REPEATS, _MOST_ATTEMPTS = 4, 4


class Sharded(Topology):
    """As many servers as there are ranks."""

    name = "sharded"

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._goes_straight = False

    @classmethod
    def servers_among(cls, world_size: int) -> int:
        """Return the number of ranks."""
        return world_size

    @classmethod
    def legs(cls, load: Load) -> list[Leg]:
        """Describe the all-to-all and the all-gather around a ring; see :class:`Topology`.

        Every rank of a node sends to every rank of the others, through the node's card.
        """
        n, ranks = load.world_size, load.ranks_per_node
        chunk = load.payload_bytes / n
        card = ranks * (n - ranks) * chunk
        return [
            Leg("up/sharded", card, card, 1, n - 2, (ranks - 1) * chunk),
            load.around_ring("down/sharded", (n - 1) * chunk, 1, n - 2),
        ]

    def measure_route(self, group: Group) -> None:
        """Measure the round-trip time of empty messages on both routes; see :class:`Topology`."""
        if self.servers <= 2:  # both routes are the same
            return
        sent, got = torch.zeros(2, self.servers, dtype=torch.uint8, device="cpu")
        routes = (
            lambda: all_gather_flat(got, sent[:1], group),
            lambda: self.send_up(sent, got, group),
        )
        near_s = _NEAR_S * (self.servers - 2)
        best = [math.inf, math.inf]
        for _ in range(_MOST_ATTEMPTS):
            best = [min(s, _fastest(route)) for s, route in zip(best, routes, strict=True)]
            ring_s, straight_s = slowest(best, group, sent.device)
            # A busy machine does not explain such a difference: further measurements decide the same.
            if not near_s * _SURELY_NEAR < ring_s - straight_s < near_s * _SURELY_FAR:
                break
        self._goes_straight = ring_s - straight_s > near_s
        self.route = (
            f"downlinks {'straight' if self._goes_straight else 'around a ring'}: an empty one takes "
            f"{1e3 * ring_s:.2f} ms around a ring, {1e3 * straight_s:.2f} ms straight"
        )

    def outgoing(self, downlink: Tensor) -> Tensor:
        """Return a buffer for one copy of the chunk, or for one per rank on the straight route."""
        copies = self.servers if self._goes_straight else 1
        return downlink.new_zeros(copies, downlink.shape[1])

    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink, see :class:`Topology`."""
        return all_to_all_flat(received.view(-1), payload.view(-1), group)

    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink, see :class:`Topology`."""
        if not self._goes_straight:
            return all_gather_flat(payload.view(-1), outgoing[0], group)
        outgoing[1:] = outgoing[0]
        return self.send_up(outgoing, payload, group)


def _fastest(start: Callable[[], dist.Work | None]) -> float:
    """Return the shortest of a few times; the first collective may have to make connections."""
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        finish(start())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
