"""Topology "sharded": every rank is the server of its share of every parameter.

Chunks go to their servers by an all-to-all, each server reduces and quantizes its own, and sends the
result to everyone. Blocks and the order of summation are those of "rank0", so the results are too;
only the traffic differs, and no rank carries more than any other.

On Gloo the results take one of two ways, with the same bytes on every link. *Around a ring*, Gloo's
all-gather: every link has one sender and one receiver, which fills it best, but a result waits N - 1
times for as long as a message is under way. *Straight*, an all-to-all of N copies: it waits once.
Near ranks are some percent faster with the ring; ranks 20 ms apart, half as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.compat import Group, all_gather_flat, all_to_all_flat
from effadam_hook.exchange.timing import slowest
from effadam_hook.exchange.waiting import finish

__all__ = ["Sharded"]

_NEAR_S = 1e-3
"""What an empty message may wait for another's arrival: less than what full ones gain."""
_SURELY_NEAR, _SURELY_FAR = 1 / 4, 16.0
_REPEATS, _MOST_LOOKS = 4, 4


class Sharded:
    """As many servers as ranks.

    Args:
        rank: This process's rank in the group.
        world_size: The group's size.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.name = "sharded"
        self.servers = world_size
        self.serves: int | None = rank
        self.way = ""
        self._goes_straight = False

    def settle(self, group: Group) -> None:
        """Find out how far apart ranks are, see :class:`~effadam_hook.exchange.topology.Topology`."""
        if self.servers <= 2:  # the two ways are one
            return
        sent, got = torch.zeros(2, self.servers, dtype=torch.uint8, device="cpu")
        ways = (
            lambda: all_gather_flat(got, sent[:1], group),
            lambda: self.send_up(sent, got, group),
        )
        near_s = _NEAR_S * (self.servers - 2)
        best = [math.inf, math.inf]
        for _ in range(_MOST_LOOKS):
            best = [min(s, _fastest(way)) for s, way in zip(best, ways, strict=True)]
            ring_s, straight_s = slowest(best, group, sent.device)
            # Beyond what a busy machine adds, or without it: a further look would say the same.
            if not near_s * _SURELY_NEAR < ring_s - straight_s < near_s * _SURELY_FAR:
                break
        self._goes_straight = ring_s - straight_s > near_s
        self.way = (
            f"downlinks {'straight' if self._goes_straight else 'around a ring'}: an empty one takes "
            f"{1e3 * ring_s:.2f} ms around a ring, {1e3 * straight_s:.2f} ms straight"
        )

    def outgoing(self, downlink: Tensor) -> Tensor:
        """A copy of the server's chunk for every rank if it goes straight, else one."""
        copies = self.servers if self._goes_straight else 1
        return downlink.new_zeros(copies, downlink.shape[1])

    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink, see :class:`~effadam_hook.exchange.topology.Topology`."""
        return all_to_all_flat(received.view(-1), payload.view(-1), group)

    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink, see :class:`~effadam_hook.exchange.topology.Topology`."""
        if not self._goes_straight:
            return all_gather_flat(payload.view(-1), outgoing[0], group)
        outgoing[1:] = outgoing[0]
        return self.send_up(outgoing, payload, group)


def _fastest(start: Callable[[], dist.Work | None]) -> float:
    """The shortest of a few times; the first may have to make connections."""
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        finish(start())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
