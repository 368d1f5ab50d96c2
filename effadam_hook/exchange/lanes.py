"""The order of collectives on Gloo: three lanes, one thread each, every lane first in, first out.

A second collective that is started from a future's callback hangs or aborts on Gloo as soon as there
are two buckets, because the ranks start it in different orders. Here a collective is only ever
started by the lane that owns its group, and buckets pass the lanes in the order in which DDP hands
them over, which is the same on every rank::

    hook ──► lane "up"                lane "across"                 lane "down"
             [1] encode               [3] wait for the uplink       [6] wait for the downlink
             [2] start the uplink     [4] reduce (servers only)     [7] decode
                 (group "up")         [5] start the downlink        [8] complete the future
                                          (group "down")

While bucket k is on its way down, bucket k+1 is on its way up, and backward goes on computing. Large
buckets come in parts, for the same reason.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.exchange.compat import abandon
from effadam_hook.exchange.dense import start_average
from effadam_hook.exchange.gloo import make_gloo_groups
from effadam_hook.exchange.job import Job
from effadam_hook.exchange.lane import Lane
from effadam_hook.exchange.passage import Hold, Passage
from effadam_hook.exchange.topology import Topology
from effadam_hook.exchange.watchdog import Watch
from effadam_hook.layout import part_numel

__all__ = ["LaneExchange"]


class LaneExchange:
    """Runs jobs on CPU tensors over Gloo.

    Args:
        topology: Who is the server.
        group: DDP's process group, whose ranks and time-out the two further groups get.
        watch: Knows the buckets under way.
        held: The wait within which the exchange is opened, to name what is done.
    """

    def __init__(
        self, topology: Topology, group: dist.ProcessGroup, watch: Watch, held: Hold
    ) -> None:
        self.part_numel: int | None = part_numel(group.size())
        self._topology = topology
        groups = make_gloo_groups(["up", "down"], watch.run_id, group, watch.is_going_on)
        self._groups = groups
        self._up_group, self._down_group = (made.group for made in groups)
        held.phase = "measuring round trips"
        try:
            topology.settle(self._up_group)
        except BaseException:
            abandon(*groups)
            raise
        self._up = Lane("effadam-up", self._step_up, watch)
        self._across = Lane("effadam-across", self._step_across, watch)
        self._down = Lane("effadam-down", self._step_down, watch)
        watch.on_failure(lambda: abandon(*groups))
        for lane in (self._up, self._across, self._down):
            watch.on_close(lane.close)
        watch.on_close(self._let_go)

    def _let_go(self) -> None:
        """End the groups; those that may never end have been abandoned before."""
        self._groups.clear()
        del self._up_group, self._down_group

    def new_future(self) -> Future[Tensor]:
        """A future for a job, to be handed to DDP."""
        return Future()

    def submit(self, job: Job, passage: Passage) -> None:
        """Start a job.

        Args:
            job: The bucket's job; its buffers are in use until the passage ends.
            passage: Ends with the decoded bucket, or with what went wrong.
        """
        self._up.put(passage, job)

    def _step_up(self, passage: Passage, job: Job) -> None:
        if job.averages_first:
            passage.phase = "dense average"
            passage.work = start_average(job.bucket, self._up_group)
            passage.wait()
            passage.phase = "encode"
        job.encode()  # [1]
        passage.phase = "uplink"
        passage.work = self._topology.send_up(job.uplink, job.received, self._up_group)  # [2]
        self._across.put(passage, job)

    def _step_across(self, passage: Passage, job: Job) -> None:
        passage.wait()  # [3]
        if self._topology.serves is not None:
            passage.phase = "reduce"
            job.reduce()  # [4]
        passage.phase = "downlink"
        passage.work = self._topology.send_down(job.outgoing, job.downlink, self._down_group)  # [5]
        self._down.put(passage, job)

    def _step_down(self, passage: Passage, job: Job) -> None:
        passage.wait()  # [6]
        passage.phase = "decode"
        job.decode()  # [7]
        passage.succeed()  # [8]
