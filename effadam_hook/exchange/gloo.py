"""The order of collectives on Gloo: a thread and a group for each stage, first in, first out.

A second collective that is started from a future's callback hangs or aborts on Gloo as soon as there
are two buckets, because the ranks start it in different orders. Here the thread of a stage alone starts
collectives on the group of that stage, and buckets pass the threads in the order in which DDP passes
them over, which is the same on every rank. A group connects the ranks that the stage's collective
connects: all, the node's, or those with the same place in other nodes. With two collectives a
bucket, as in "rank0" and "sharded"::

    hook ──► thread "encode"          thread "reduce"              thread "decode"
             [1] encode               [3] wait for the uplink       [6] wait for the downlink
             [2] start the uplink     [4] reduce (servers only)     [7] decode
                 (its own group)      [5] start the downlink        [8] complete the future
                                          (its own group)

While the downlink of bucket k is in flight, so is the uplink of bucket k+1, and backward continues.
Large buckets travel in parts, for the same reason. In "hierarchical" there are two more stages, so
that the node's mean of bucket k+2 and its gather of bucket k-1 overlap with them.

Gloo sends from host memory. The buffers of buckets on a GPU are staged, see ``staging.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.collectives import abandon, all_reduce
from effadam_hook.exchange.dense import start_average
from effadam_hook.exchange.groups import make_gloo_groups
from effadam_hook.exchange.node_bound import NodeBound
from effadam_hook.exchange.staging import Staging
from effadam_hook.exchange.topology import Topology
from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.watchdog import Watchdog
from effadam_hook.exchange.worker_thread import WorkerThread
from effadam_hook.wire.parts import part_numel

__all__ = ["GlooExchange"]


class GlooExchange:
    """Run jobs over Gloo.

    Args:
        topology: This rank's view of the servers.
        group: DDP's process group, whose ranks and time-out the groups of the stages get.
        staging: The memory of the collectives.
        watchdog: Holds the buckets in flight.
        hold: The wait within which the exchange is opened; its phase is kept up to date.
    """

    def __init__(
        self,
        topology: Topology,
        group: dist.ProcessGroup,
        staging: Staging,
        watchdog: Watchdog,
        hold: Hold,
    ) -> None:
        self.staging = staging
        self.part_numel: int | None = part_numel(group.size())
        self._stages = topology.stages
        transfers = [(stage.transfer, stage.ranks) for stage in self._stages if stage.transfer]
        groups = make_gloo_groups(transfers, watchdog.run_id, group, watchdog.is_going_on)
        self._groups = groups
        hold.phase = "measuring round trips"
        try:
            topology.measure_route(groups[topology.route_stage].group)
        except BaseException:
            abandon(*groups)
            raise
        self._threads = [
            WorkerThread(f"effadam-{stage.phase}", partial(self._run, number), watchdog)
            for number, stage in enumerate(self._stages)
        ]
        watchdog.on_failure(lambda: abandon(*groups))
        for thread in self._threads:
            watchdog.on_close(thread.close)
        watchdog.on_close(groups.clear)  # those that may never end have been abandoned before

    def submit(self, job: BucketJob, inflight: InflightBucket) -> None:
        """Start a job.

        Args:
            job: The bucket's job; its buffers are in use until the bucket has arrived.
            inflight: Completed with the decoded bucket, or with the error.
        """
        job.ready = self.staging.mark()
        self._threads[0].put(inflight, job)

    def settle(self) -> None:
        """Wait for the arithmetic in progress, see :class:`effadam_hook.exchange.exchange.Exchange`."""
        for thread in self._threads:
            thread.settle()
        self.staging.settle()

    def _run(self, number: int, inflight: InflightBucket, job: BucketJob) -> None:
        """Run one stage of a bucket, in the thread of that stage."""
        stage = self._stages[number]
        inflight.wait()  # [3] [6] for the collective of the stage before
        with self.staging.stage(number, job):
            if stage.prepare is not None:
                inflight.phase = stage.phase
                _run_arithmetic(stage.prepare, job)
            if stage.averages_first and job.bound is not None:
                if job.bound.hold(job.values, partial(self._finish, number, inflight, job)):
                    self._bound(number, inflight, job.bound)
                return
        self._finish(number, inflight, job)

    def _bound(self, number: int, inflight: InflightBucket, bound: NodeBound) -> None:
        """Bound the norm of the node's mean gradient, whose last bucket has been averaged."""
        inflight.phase = "norm of the node's gradient"
        square = bound.square()
        with self.staging.on_host(square) as total:
            # The group of the stage before: its thread has started all collectives of this step, and
            # starts those of the next one after the end of this one.
            inflight.work = all_reduce(total, self._groups[number - 1].group)
            inflight.wait()
        bound.scale(square)
        bound.proceed()

    def _finish(self, number: int, inflight: InflightBucket, job: BucketJob) -> None:
        """Run the arithmetic of a stage, and start its collective."""
        stage = self._stages[number]
        with self.staging.stage(number, job):
            self._compute(number, inflight, job)
        if stage.start is None:
            return
        inflight.phase = stage.transfer
        inflight.work = stage.start(job, self._groups[number].group)  # [2] [5]
        self._threads[number + 1].put(inflight, job)

    def _compute(self, number: int, inflight: InflightBucket, job: BucketJob) -> None:
        """Run the arithmetic of a stage, and complete the bucket after the last one."""
        stage = self._stages[number]
        if stage.averages_first and job.averages_first:
            inflight.phase = "dense average"
            with self.staging.on_host(job.values) as values:
                inflight.work = start_average(values, self._groups[number].group)
                inflight.wait()
        if stage.compute is not None:
            inflight.phase = stage.phase
            _run_arithmetic(stage.compute, job)  # [1] [4] [7]
        if stage.start is None:
            inflight.succeed()  # [8]


def _run_arithmetic(action: Callable[[BucketJob], None], job: BucketJob) -> None:
    """Run arithmetic, whose errors are the cause on all ranks; those of a collective may follow one."""
    try:
        action(job)
    except EffAdamError:
        raise
    except RuntimeError as error:  # of the device, or out of its memory
        raise EffAdamError(f"{type(error).__name__}: {error}") from error
