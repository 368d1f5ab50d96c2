"""The exchange that runs bucket jobs, chosen by the backend of the process group."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.errors import UnsupportedBackendError
from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.collectives import backend_of
from effadam_hook.exchange.gloo import GlooExchange
from effadam_hook.exchange.nccl import NcclExchange
from effadam_hook.exchange.topology import Topology
from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.watchdog import Watchdog

__all__ = ["Exchange", "check_backend", "make_exchange"]


class Exchange(Protocol):
    """Runs jobs in the order in which they are submitted, the same on every rank.

    Attributes:
        part_numel: Elements that make a job worth its overhead, so that larger buckets are better cut
            into several; None where jobs do not overlap.
    """

    part_numel: int | None

    def new_future(self) -> Future[Tensor]:
        """A future for a job, to be handed to DDP before or after the job is submitted."""
        ...

    def submit(self, job: BucketJob, inflight: InflightBucket) -> None:
        """Start a job; the inflight ends after decoding, or with what went wrong."""
        ...


def make_exchange(
    topology: Topology,
    group: dist.ProcessGroup,
    device: torch.device,
    watchdog: Watchdog,
    held: Hold,
) -> Exchange:
    """The exchange that is safe for a group's backend; every rank of the group must call this.

    Args:
        topology: Who is the server.
        group: DDP's process group.
        device: Where the buckets are.
        watchdog: Knows the buckets under way, and ends the exchange.
        held: The wait within which this happens, to name what is done.

    Returns:
        Threads and further groups for Gloo, a side stream for NCCL.

    Raises:
        UnsupportedBackendError: If the backend for that device is neither.
    """
    if check_backend(group, device) == "gloo":
        return GlooExchange(topology, group, watchdog, held)
    return NcclExchange(topology, group, device)


def check_backend(group: dist.ProcessGroup, device: torch.device) -> str:
    """Find out if there is an exchange for a group.

    Args:
        group: DDP's process group.
        device: Where the buckets are.

    Returns:
        ``"gloo"`` for tensors on the CPU or ``"nccl"`` for those on CUDA.

    Raises:
        UnsupportedBackendError: If the backend for that device is neither.
    """
    backend = backend_of(group, device)
    if (device.type, backend) in (("cpu", "gloo"), ("cuda", "nccl")):
        return backend
    raise UnsupportedBackendError(
        f"The process group uses the backend {backend!r} for tensors on {device.type!r}. "
        "Must be gloo on cpu or nccl on cuda: start it with "
        'init_process_group("cpu:gloo,cuda:nccl").'
    )
