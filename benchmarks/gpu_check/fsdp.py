"""FSDP2 with the hook: replicas of one GPU, over NCCL where there are several, and over Gloo on one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from effadam_hook import attach
from gpu_check.device import device_of
from gpu_check.outcome import SKIPPED, Checks, Context
from gpu_check.ranks import QUANTIZER, STEPS, Case, compare, trained
from training import ChosenGradients, drawn_gradients

__all__ = ["run"]

STARTUP_S = 40.0


def run(context: Context) -> Checks:
    """Train a model that FSDP2 shards over one GPU, or two, with replicas of it."""
    checks = Checks()
    if not hasattr(fsdp, "fully_shard"):
        checks.add(
            "FSDP2", SKIPPED, f"torch {torch.__version__} has no torch.distributed.fsdp.fully_shard"
        )
        return checks
    device = device_of(context.device)
    sizes = [2] + [4] * (device.count >= 4)
    over_nccl = [size for size in sizes if device.is_gpu and device.count >= size]
    for backend, size in (("gloo", 2), *(("nccl", size) for size in over_nccl)):
        where = f"that FSDP2 shards over {max(1, size // 2)} {context.device}, over {backend}"
        alone = Case(size, "rank0", "FSDP2 alone")
        found, error = trained(context.device, backend, [alone], STARTUP_S, train)
        if not found:
            reason = f"FSDP2 itself does not run over {backend} here: {error}"
            checks.add(f"{size} ranks {where}", SKIPPED, reason)
            continue
        cases = [Case(size, topology, "gradient") for topology in ("rank0", "sharded")]
        cases += [Case(size, "sharded", "preconditioned"), Case(size, "sharded", "dense")]
        compare(checks, context, backend, cases, where, train)
    if device.count < 2:
        reason = "torch.cuda.device_count() is 1: NCCL needs a GPU for each replica"
        checks.add("FSDP2 between GPUs over NCCL", SKIPPED, reason)
    return checks


def train(rank: int, where: torch.device, case: Case) -> dict[str, Any]:
    """Train on gradients that do not depend on weights, with two replicas.

    Returns:
        ``weights`` of the whole model, ``state`` and ``ratio``.
    """
    shards = max(1, case.world_size // 2)
    model: Any = ChosenGradients().to(where)
    names = ("replicate", "shard")
    mesh = init_device_mesh(where.type, (case.world_size // shards, shards), mesh_dim_names=names)
    fsdp.fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    state = None
    if case.mode != "FSDP2 alone":
        options: dict[str, Any] = {"enabled": case.mode != "dense"}
        if case.mode == "preconditioned":
            options |= {"optimizer": optimizer, "precondition": True}
        group = mesh.get_group("replicate")
        state = attach(
            model, process_group=group, quantizer=QUANTIZER, topology=case.topology, **options
        )
    for step in range(STEPS):
        optimizer.zero_grad()
        model([g.to(where) for g in drawn_gradients(rank, step)]).backward()
        optimizer.step()
    found = {
        "weights": torch.cat([whole(p, shards).flatten().cpu() for p in model.parameters()]),
        "ratio": 1.0 if state is None else float(state.stats()["ratio"]),
    }
    if state is not None:
        state.close()
    dist.barrier()
    return found


def whole(parameter: Any, shards: int) -> Tensor:
    """Return all elements of a sharded parameter."""
    result: Tensor = parameter.full_tensor() if shards > 1 else parameter.to_local()
    return result.detach()
