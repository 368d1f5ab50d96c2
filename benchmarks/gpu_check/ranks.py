"""Training on several ranks: on one GPU over Gloo, and over NCCL with a rank for each GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, attach
from gpu_check.outcome import Checks, Context, SkipError, require
from harness import run_ranks

__all__ = ["run_gloo", "run_nccl", "small_model"]

STEPS = 12
MODES = ("gradient", "preconditioned", "update")


def small_model() -> nn.Module:
    """Return a model with matrices of odd and even sizes, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 301), nn.Tanh(), nn.Linear(301, 256), nn.Tanh(), nn.Linear(256, 8)
    )


def trained(
    rank: int, world_size: int, device: str, topology: str, mode: str, quantizer: str
) -> dict[str, Any]:
    """Train for some steps, and return weights and figures."""
    where = (
        torch.device(device, rank % torch.cuda.device_count())
        if device == "cuda"
        else torch.device("cpu")
    )
    if where.type == "cuda":
        torch.cuda.set_device(where)
    ids = [where.index] if where.type == "cuda" else None
    model = DistributedDataParallel(small_model().to(where), device_ids=ids, bucket_cap_mb=1)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"quantizer": quantizer, "topology": topology}
    if mode == "update":
        optimizer = options["optimizer"] = EfficientAdam(model.parameters(), lr=1e-3)
    elif mode == "preconditioned":
        options |= {"optimizer": optimizer, "precondition": True}
    state = attach(model, **options)
    drawn = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(32, 64, generator=drawn).to(where)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    stats = state.stats()
    return {"weights": weights, "ratio": stats["ratio"], "steps": stats["steps"]}


def compare(context: Context, backend: str, world_size: int, topology: str, mode: str) -> str:
    """Train on the device and on the CPU; replicas must be equal, and both runs close."""
    quantizer = "lloyd4"
    arguments = (topology, mode, quantizer)
    seconds = min(120.0, context.seconds)
    ours = run_ranks(
        trained,
        world_size,
        context.device,
        *arguments,
        backend=backend,
        timeout=seconds,
        fresh=True,
    )
    law = run_ranks(trained, world_size, "cpu", *arguments, backend="gloo", timeout=seconds)
    for rank, one in enumerate(ours):
        require(torch.equal(one["weights"], ours[0]["weights"]), f"rank {rank} has other weights")
    moved = law[0]["weights"] - torch.cat(
        [p.detach().flatten() for p in small_model().parameters()]
    )
    far = ours[0]["weights"] - law[0]["weights"]
    share = float(far.norm() / moved.norm())
    require(share < 0.2, f"weights differ from the CPU's by {share:.1%} of what was learned")
    return (
        f"{share:.2%} of the way from the CPU's weights, {ours[0]['ratio']:.1f} times fewer bytes"
    )


def run_gloo(context: Context) -> Checks:
    """Train with 2 and 4 ranks on one GPU over Gloo, in all topologies and modes."""
    checks = Checks()
    cases = [(2, topology, mode) for topology in ("rank0", "sharded") for mode in MODES]
    cases += [(4, topology, "gradient") for topology in ("rank0", "sharded")]
    if context.device == "cpu":
        cases = cases[:1]
    for world_size, topology, mode in cases:
        checks.run(
            f"{world_size} ranks on one {context.device}, {topology}, {mode}",
            lambda n=world_size, t=topology, m=mode: compare(context, "gloo", n, t, m),
        )
    return checks


def run_nccl(context: Context) -> Checks:
    """Train over NCCL (RCCL on AMD), with a rank for each GPU."""
    checks = Checks()
    count = torch.cuda.device_count()

    def check(topology: str, mode: str) -> str:
        if context.device == "cpu" or not dist.is_nccl_available():
            raise SkipError("NCCL needs a GPU, and a torch that was built with it")
        return compare(context, "nccl", count, topology, mode)

    for topology in ("rank0", "sharded"):
        for mode in MODES:
            checks.run(f"{count} ranks, {topology}, {mode}", lambda t=topology, m=mode: check(t, m))
    return checks
