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

While bucket k is on its way down, bucket k+1 is on its way up, and backward goes on computing.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.compat import new_group_like
from effadam_hook.exchange.dense import average
from effadam_hook.exchange.job import Job
from effadam_hook.exchange.topology import Topology

__all__ = ["LaneExchange"]


@dataclass
class _Passage:
    """A job on its way through the lanes, and the phase that it is in."""

    job: Job
    future: Future[Tensor]
    phase: str = "encode"
    work: dist.Work | None = None

    def wait(self) -> None:
        """Wait for the collective under way."""
        if self.work is not None:
            self.work.wait()


class LaneExchange:
    """Runs jobs on CPU tensors over Gloo.

    Args:
        topology: Who is the server.
        group: DDP's process group, whose ranks and time-out the two further groups get.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup) -> None:
        self._topology = topology
        self._rank = group.rank()
        self._up_group = new_group_like(group)
        self._down_group = new_group_like(group)
        self._failure: str | None = None
        self._up = _Lane("effadam-up", self._guarded(self._step_up))
        self._across = _Lane("effadam-across", self._guarded(self._step_across))
        self._down = _Lane("effadam-down", self._guarded(self._step_down))
        _open_exchanges.add(self)

    def new_future(self) -> Future[Tensor]:
        """A future for a job, to be handed to DDP."""
        return Future()

    def submit(self, job: Job, future: Future[Tensor]) -> None:
        """Start a job.

        Args:
            job: The bucket's job; its buffers are in use until the future completes.
            future: Completed with the decoded bucket, or with what went wrong.
        """
        self._up.put(_Passage(job, future))

    def close(self) -> None:
        """End the threads; a collective under way is left to its group's time-out."""
        for lane in (self._up, self._across, self._down):
            lane.close()
        _open_exchanges.discard(self)

    def _step_up(self, passage: _Passage) -> None:
        job = passage.job
        if job.averages_first:
            passage.phase = "dense average"
            average(job.bucket, self._up_group)
            passage.phase = "encode"
        job.encode()  # [1]
        passage.phase = "uplink"
        passage.work = self._topology.send_up(job.uplink, job.received, self._up_group)  # [2]
        self._across.put(passage)

    def _step_across(self, passage: _Passage) -> None:
        job = passage.job
        passage.wait()  # [3]
        if self._topology.serves is not None:
            passage.phase = "reduce"
            job.reduce()  # [4]
        passage.phase = "downlink"
        passage.work = self._topology.send_down(job.outgoing, job.downlink, self._down_group)  # [5]
        self._down.put(passage)

    def _step_down(self, passage: _Passage) -> None:
        passage.wait()  # [6]
        passage.phase = "decode"
        passage.future.set_result(passage.job.decode())  # [7] [8]

    def _guarded(self, step: Callable[[_Passage], None]) -> Callable[[_Passage], None]:
        """A step whose failure reaches the future, and after which nothing is started any more."""

        def run(passage: _Passage) -> None:
            try:
                if self._failure is not None:
                    raise EffAdamError(
                        f"not started, the exchange has stopped: {self._failure}. "
                        "Restart all ranks from a checkpoint."
                    )
                step(passage)
            except BaseException as error:
                message = f"Rank {self._rank}, {passage.job.label}, {passage.phase}: {error}"
                self._failure = self._failure or message
                failure = EffAdamError(message)
                failure.__cause__ = error
                passage.future.set_exception(failure)  # type: ignore[arg-type]

        return run


class _Lane:
    """A thread that takes passages one at a time, in order."""

    def __init__(self, name: str, step: Callable[[_Passage], None]) -> None:
        self._queue: SimpleQueue[_Passage | None] = SimpleQueue()
        # A daemon, so that a rank whose peer is gone can still end.
        self._thread = threading.Thread(target=self._run, args=(step,), name=name, daemon=True)
        self._thread.start()

    def put(self, passage: _Passage) -> None:
        self._queue.put(passage)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=1.0)

    def _run(self, step: Callable[[_Passage], None]) -> None:
        while (passage := self._queue.get()) is not None:
            step(passage)


_open_exchanges: weakref.WeakSet[LaneExchange] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for exchange in list(_open_exchanges):
        exchange.close()
