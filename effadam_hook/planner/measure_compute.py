"""Measurement of a training step without communication, on all ranks concurrently."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook.exchange.collectives import new_group_alone
from effadam_hook.exchange.probe import Probe
from effadam_hook.planner.predict import Compute
from effadam_hook.planner.workloads import TrainingTask, UserModel, to_device

__all__ = ["measure_compute"]

_WINDOWS, _WINDOW_S = 5, 0.3


def measure_compute(
    probe: Probe, workload: TrainingTask, bucket_mb: float | None, device: torch.device
) -> Compute:
    """Time steps under DDP that send nothing; a collective operation.

    Args:
        probe: The probe of the ranks.
        workload: The training task.
        bucket_mb: DDP's ``bucket_cap_mb``; None for its default.
        device: Device of this rank.

    Returns:
        Means over steps and ranks, from the median of several windows; zeros for a user's model without
        a loss.
    """
    model = workload.model().to(device)
    if isinstance(workload, UserModel) and not workload.can_step:
        return Compute()
    batch = to_device(workload.batch(probe.rank), device)
    ddp = _wrap(model, bucket_mb)
    workload.backward(workload.loss(ddp, batch))
    if any(p.grad is None for p in model.parameters() if p.requires_grad):
        model.zero_grad()
        del ddp  # and its hooks, before the model is wrapped again
        ddp = _wrap(model, bucket_mb, find_unused=True)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.0, fused=True)
    parts: list[list[float]] = []

    def one_step() -> None:
        times = [time.perf_counter()]
        loss = workload.loss(ddp, batch)
        probe.synchronize()
        times.append(time.perf_counter())
        workload.backward(loss)
        probe.synchronize()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        probe.synchronize()
        times.append(time.perf_counter())
        parts.append([end - begin for begin, end in pairwise(times)])

    for _ in range(2):  # DDP rebuilds its buckets after the first step
        one_step()
    count = probe.count_for(
        one_step, _WINDOW_S
    )  # equal on all ranks, as a loss may run collectives
    windows = []
    for _ in range(_WINDOWS):
        parts.clear()
        probe.share(None)
        for _ in range(count):
            one_step()
        shared = [part for rank in probe.share(parts) for part in rank]
        windows.append(Compute(*(statistics.fmean(part) for part in zip(*shared, strict=True))))
    # The median, not the minimum: ranks that finish early leave their cores to the others.
    windows.sort(key=lambda one: one.total_s)
    return windows[len(windows) // 2]


def _wrap(
    model: nn.Module, bucket_mb: float | None, find_unused: bool = False
) -> DistributedDataParallel:
    """Wrap a model in DDP over a group of this rank alone, which does all of DDP's work but sending."""
    return DistributedDataParallel(
        model,
        process_group=new_group_alone(),
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
    )
