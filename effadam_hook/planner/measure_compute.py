"""Measures what a training step takes without communication, with all ranks at it at once."""

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
from effadam_hook.planner.workloads import Trained, UserModel, to_device

__all__ = ["measure_compute"]

_WINDOWS, _WINDOW_S = 5, 0.3


def measure_compute(
    probe: Probe, workload: Trained, bucket_mb: float | None, device: torch.device
) -> Compute:
    """Time steps under DDP in which nothing is sent; a collective operation.

    Args:
        probe: The ranks.
        workload: What is trained.
        bucket_mb: DDP's ``bucket_cap_mb``; None is its default.
        device: Where this rank computes.

    Returns:
        Mean over steps and ranks, and of a few tries the one in the middle; nothing if the user's model
        came without a loss.
    """
    model = workload.model().to(device)
    if isinstance(workload, UserModel) and not workload.can_step:
        return Compute()
    batch = to_device(workload.batch(probe.rank), device)
    ddp = _wrap(model, bucket_mb)
    workload.backward(workload.loss(ddp, batch))
    if any(p.grad is None for p in model.parameters() if p.requires_grad):
        model.zero_grad()
        del ddp  # with its hooks, before another one comes
        ddp = _wrap(model, bucket_mb, finds_unused=True)
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

    for _ in range(2):  # DDP arranges its buckets anew after the first
        one_step()
    count = probe.count_for(one_step, _WINDOW_S)  # a loss may have collectives of its own
    found = []
    for _ in range(_WINDOWS):
        parts.clear()
        probe.share(None)
        for _ in range(count):
            one_step()
        shared = [part for rank in probe.share(parts) for part in rank]
        found.append(Compute(*(statistics.fmean(part) for part in zip(*shared, strict=True))))
    # Not the best: ranks that are done early leave their cores to the others.
    found.sort(key=lambda one: one.forward_s + one.backward_s + one.rest_s)
    return found[len(found) // 2]


def _wrap(
    model: nn.Module, bucket_mb: float | None, finds_unused: bool = False
) -> DistributedDataParallel:
    """All that DDP does in a step but communicate: its group is this rank alone."""
    return DistributedDataParallel(
        model,
        process_group=new_group_alone(),
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=finds_unused,
    )
