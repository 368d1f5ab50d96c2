"""The interface of a topology: its servers, and the stages of a bucket.

The class describes the topology before any rank exists: its name, the number of servers among N
ranks, and the traffic of its collectives. An instance is the view of one rank: the chunk that it
serves, and the stages. A *stage* is arithmetic on this rank followed by a collective, for which the
next stage waits. The exchanges on Gloo and NCCL run the stages in their order, whatever their
number::

    rank0, sharded    encode ─ uplink ─► reduce ─ downlink ─► decode
    hierarchical      pack ─ node mean ─► encode ─ uplink ─► reduce ─ downlink ─►
                      node gather ─► decode
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.collectives import Group
from effadam_hook.exchange.topology.leg import Leg, Load

__all__ = ["Stage", "Topology", "decode", "encode", "reduce"]


@dataclass(frozen=True)
class Stage:
    """Arithmetic on this rank, then a collective that the next stage waits for.

    Attributes:
        phase: Name of the arithmetic in messages.
        compute: The arithmetic; None where this rank has none to do.
        transfer: Name of the collective in messages; empty for the last stage, which has none.
        start: Starts the collective on a group that only this stage uses, except for the bound of
            gradients on nodes, and returns the work.
        prepare: Arithmetic before the dense average of ``averages_first``; None for none.
        averages_first: Whether the values of a bucket with :attr:`BucketJob.averages_first` are
            averaged densely, on the group of this stage, before the arithmetic.
        ranks: The ranks of the process group that take part in the collective, ascending; None for
            all of them.
    """

    phase: str
    compute: Callable[[BucketJob], None] | None
    transfer: str = ""
    start: Callable[[BucketJob, Group], dist.Work | None] | None = None
    prepare: Callable[[BucketJob], None] | None = None
    averages_first: bool = False
    ranks: tuple[int, ...] | None = None


class Topology(ABC):
    """One rank's view of the servers, and the stages of a bucket.

    Args:
        rank: Rank of this process in the group.
        world_size: Size of the group.

    Attributes:
        name: The public name.
        servers: Number of servers, and of the chunks of a bucket.
        serves: Index of the chunk that this rank serves; None if it serves none.
        worker_ranks: The ranks from which this rank receives uplinks as a server, in the order of
            summation. Their number is N in the formulas.
        server_ranks: The rank that serves each chunk.
        shares: Number of ranks that divide the encoding of a worker's bucket among themselves.
        share: Index of the share that this rank encodes.
        route_stage: Index of the stage on whose group :meth:`measure_route` measures.
        route: The route of the messages, with the reason; empty without a choice.
    """

    name: ClassVar[str]
    route_stage: ClassVar[int] = 0

    def __init__(self, rank: int, world_size: int) -> None:
        self.servers = self.servers_among(world_size)
        self.serves = rank if rank < self.servers else None
        self.worker_ranks: Sequence[int] = range(world_size)
        self.server_ranks: Sequence[int] = range(self.servers)
        self.shares, self.share = 1, 0
        self.route = ""

    @classmethod
    @abstractmethod
    def servers_among(cls, world_size: int) -> int:
        """Return the number of servers among ``world_size`` ranks; the first ranks are the servers."""

    @classmethod
    @abstractmethod
    def legs(cls, load: Load) -> list[Leg]:
        """Describe the collectives of one bucket.

        Args:
            load: Sizes and nodes.

        Returns:
            One leg for each collective, in their order.
        """

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of a bucket, in their order."""
        reduces = reduce if self.serves is not None else None
        return (
            Stage("encode", encode, "uplink", self._start_uplink, averages_first=True),
            Stage("reduce", reduces, "downlink", self._start_downlink),
            Stage("decode", decode),
        )

    def measure_route(self, group: Group) -> None:
        """Choose the route of messages on Gloo; a collective operation.

        The base class measures nothing: it has one route.

        Args:
            group: The process group, or another one of the same ranks. Make buffers afterwards.
        """
        self.route = ""

    def outgoing(self, downlink: Tensor) -> Tensor:
        """Return the buffer ``[copies, stride_bytes]`` that this rank sends from as a server.

        Args:
            downlink: ``[servers, stride_bytes]``, the buffer of the downlink payload.
        """
        return downlink.new_zeros(1, downlink.shape[1])

    @abstractmethod
    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink.

        Args:
            payload: ``[servers, stride_bytes]``, the chunk of this worker for every server.
            received: ``[world_size, stride_bytes]``, filled with the chunks of all workers for this
                server; empty on a rank that is no server.
            group: The process group.

        Returns:
            The work to wait for.
        """

    @abstractmethod
    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink.

        Args:
            outgoing: The buffer of :meth:`outgoing`, with the first row filled.
            payload: ``[servers, stride_bytes]``, filled with the chunks of all servers.
            group: The process group.

        Returns:
            The work to wait for.
        """

    def _start_uplink(self, job: BucketJob, group: Group) -> dist.Work | None:
        return self.send_up(job.uplink, job.received, group)

    def _start_downlink(self, job: BucketJob, group: Group) -> dist.Work | None:
        return self.send_down(job.outgoing, job.served, group)


def encode(job: BucketJob) -> None:
    """Encode the bucket, or this rank's share of it."""
    job.encode()


def reduce(job: BucketJob) -> None:
    """Reduce what this rank has received as a server."""
    job.reduce()


def decode(job: BucketJob) -> None:
    """Decode the bucket."""
    job.decode()
