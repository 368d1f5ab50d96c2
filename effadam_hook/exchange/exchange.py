"""The exchange that runs bucket jobs, chosen by the backend of the process group."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from effadam_hook.errors import UnsupportedBackendError
from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.collectives import backend_of, wire_device
from effadam_hook.exchange.gloo import GlooExchange
from effadam_hook.exchange.nccl import NcclExchange
from effadam_hook.exchange.staging import PinnedStaging, Staging
from effadam_hook.exchange.streams import streams_of
from effadam_hook.exchange.topology import Topology
from effadam_hook.exchange.watchdog.inflight import Hold, InflightBucket
from effadam_hook.exchange.watchdog.watchdog import Watchdog

__all__ = ["Exchange", "check_backend", "make_exchange"]


class Exchange(Protocol):
    """An exchange: it runs jobs in the order of their submission, the same on every rank.

    Attributes:
        part_numel: Number of elements from which a job is worth its overhead: larger buckets are
            cut into parts. None where jobs do not overlap.
        staging: The memory from which its collectives send.
    """

    part_numel: int | None
    staging: Staging

    def submit(self, job: BucketJob, inflight: InflightBucket) -> None:
        """Start a job; the bucket in flight completes after decoding, or with an error."""
        ...

    def settle(self) -> None:
        """Wait for the arithmetic in progress, so that this thread may read and write residuals.

        No bucket is in flight any more. On a GPU the wait orders this thread's stream.
        """
        ...


def make_exchange(
    topology: Topology,
    group: dist.ProcessGroup,
    device: torch.device,
    watchdog: Watchdog,
    held: Hold,
) -> Exchange:
    """Make the exchange for the backend of a group; a collective operation.

    Args:
        topology: This rank's view of the servers.
        group: DDP's process group.
        device: Device of the buckets.
        watchdog: Records the buckets in flight, and stops the exchange.
        held: The hold within which the exchange is opened; its phase is kept up to date.

    Returns:
        For Gloo worker threads and further groups, with staging if the device is a GPU; for NCCL a
        side stream.

    Raises:
        UnsupportedBackendError: If the backend for that device is neither.
    """
    backend, streams = check_backend(group, device), streams_of(device)
    if streams is None:
        return GlooExchange(topology, group, Staging(), watchdog, held)
    if backend == "gloo":
        staging = PinnedStaging(streams, len(topology.stages))
        return GlooExchange(topology, group, staging, watchdog, held)
    return NcclExchange(topology, group, streams)


def check_backend(group: dist.ProcessGroup, device: torch.device) -> str:
    """Check that an exchange exists for the backend of a group.

    Args:
        group: DDP's process group.
        device: Device of the buckets.

    Returns:
        ``"gloo"`` or ``"nccl"``.

    Raises:
        UnsupportedBackendError: If the backend for that device is neither, or the device is neither
            the CPU nor CUDA.
    """
    backend = backend_of(group, device)
    on_gloo = backend == "gloo" and wire_device(group, device).type == "cpu"
    if (on_gloo and device.type in ("cpu", "cuda")) or (device.type, backend) == ("cuda", "nccl"):
        return backend
    raise UnsupportedBackendError(
        f"The process group uses the backend {backend!r} for tensors on {device.type!r}. "
        "Must be gloo on cpu, or gloo on cpu and cuda, or nccl on cuda: start it with "
        'init_process_group("cpu:gloo,cuda:nccl"), or with "gloo" where there is no NCCL.'
    )
