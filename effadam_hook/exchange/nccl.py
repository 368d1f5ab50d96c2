"""The order of collectives on NCCL: no thread, no callback, one side stream.

Everything is issued from the hook itself, in the order in which DDP calls it, on one stream beside
backward's: several communicators at once can deadlock unless all ranks issue their collectives in
one order. Flat topologies use DDP's own process group; "hierarchical" uses one group of the node
and one of the ranks with the same place in other nodes, which all stages share. Waiting for a
collective only orders streams: the host continues at once, and the device is never synchronised.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist

from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.collectives import all_reduce
from effadam_hook.exchange.dense import start_average
from effadam_hook.exchange.groups import make_stage_groups
from effadam_hook.exchange.staging import Staging
from effadam_hook.exchange.streams import Streams
from effadam_hook.exchange.topology import Topology
from effadam_hook.exchange.watchdog.inflight import InflightBucket

__all__ = ["NcclExchange"]


class NcclExchange:
    """Run jobs on CUDA tensors over NCCL.

    Args:
        topology: This rank's view of the servers.
        group: DDP's process group.
        streams: The streams of the buckets' device.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup, streams: Streams) -> None:
        self.staging = Staging(sends_from_host=False, computes_on_host=False)
        self.part_numel: int | None = None
        self._stages = topology.stages
        self._groups = make_stage_groups([stage.ranks for stage in self._stages], group)
        self._streams = streams
        self._stream = streams.new_stream()

    def submit(self, job: BucketJob, inflight: InflightBucket) -> None:
        """Issue a job.

        Args:
            job: The bucket's job.
            inflight: Completed, on the device, with the decoded bucket.
        """
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.on(self._stream):
            # The allocator must not reuse the bucket while this stream reads it.
            self._streams.keep(job.bucket, self._stream)
            self._run(0, job, inflight)

    def _run(self, first: int, job: BucketJob, inflight: InflightBucket) -> None:
        """Issue the stages from one on, or up to the bound that needs the other buckets."""
        for number in range(first, len(self._stages)):
            stage = self._stages[number]
            if stage.prepare is not None:
                stage.prepare(job)
            if stage.averages_first and job.bound is not None:
                if job.bound.hold(job.values, partial(self._finish, number, job, inflight)):
                    square = job.bound.square()
                    _order(all_reduce(square, self._groups[number - 1]))
                    job.bound.scale(square)
                    job.bound.proceed()
                return
            self._issue(number, job)
        inflight.succeed()

    def _finish(self, number: int, job: BucketJob, inflight: InflightBucket) -> None:
        """Issue the rest of a held bucket."""
        self._issue(number, job)
        self._run(number + 1, job, inflight)

    def _issue(self, number: int, job: BucketJob) -> None:
        """Issue the arithmetic of a stage and its collective."""
        stage, group = self._stages[number], self._groups[number]
        if stage.averages_first and job.averages_first:
            _order(start_average(job.values, group))
        if stage.compute is not None:
            stage.compute(job)
        if stage.start is not None:
            _order(stage.start(job, group))

    def settle(self) -> None:
        """Order this thread's stream, see :class:`effadam_hook.exchange.exchange.Exchange`."""
        self._streams.current_stream().wait_stream(self._stream)


def _order(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
