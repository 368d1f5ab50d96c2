"""Measure the effect of residuals from an old learning rate after a large drop, in update mode.

    python benchmarks/rate_drop.py --quantizer lloyd2

Trains a small regression with noisy targets, divides the learning rate, and prints loss and step length
after the drop: for AdamW, and for update mode with unchanged residuals, with residuals scaled by the
ratio of the rates, and with residuals applied to the weights at once.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach
from effadam_hook.feedback.checksum import with_checksum

TREATMENTS = ("adamw", "unchanged", "scaled", "applied")
RATE, DROP_AT, AFTER = 4e-3, 600, 120
SHOWN = (0, 1, 2, 5, 8, 13, 18, 28, 38, 58, 88, 120)


def apply_residuals(model: nn.Module, state: EfficientAdamState) -> None:
    """Apply all residuals to the weights, without changing the residuals."""
    saved = state.state_dict()
    for name, parameter in model.named_parameters():
        pending = torch.zeros(parameter.numel())
        if name in saved["worker"]:
            pending += saved["worker"][name] / dist.get_world_size()
        if name in saved["server"]:
            start, share = saved["server_start"][name], saved["server"][name]
            pending[start : start + share.numel()] += share
        dist.all_reduce(pending)
        parameter.data.view(-1).sub_(pending)


def scale_residuals(state: EfficientAdamState, factor: float) -> None:
    """Multiply the residuals of both sides by a factor."""
    saved = state.state_dict()
    for side in ("worker", "server"):
        saved[side] = {name: value * factor for name, value in saved[side].items()}
    state.load_state_dict(with_checksum(saved))


def train(rank: int, treatment: str, quantizer: str, factor: float) -> list[tuple[float, float]]:
    """Train; return loss and step length from the last step before the drop."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    inputs = torch.randn(4096, 64, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(0)
    layers = (nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8))
    model = nn.Sequential(*layers)
    wrapped = DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer
    state = None
    if treatment == "adamw":
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=RATE, weight_decay=0.0)
    else:
        optimizer = efficient_adam = EfficientAdam(
            wrapped.parameters(), lr=RATE, betas=(0.6, 0.999), second_moment="local"
        )
        state = attach(wrapped, optimizer=efficient_adam, quantizer=quantizer, topology="sharded")
    data = torch.Generator().manual_seed(100 + rank)
    curve = []
    for step in range(DROP_AT + AFTER):
        if step == DROP_AT:
            optimizer.param_groups[0]["lr"] = RATE / factor
            if state is not None and treatment == "applied":
                apply_residuals(model, state)
                scale_residuals(state, 0.0)
            elif state is not None and treatment == "scaled":
                scale_residuals(state, 1 / factor)
        batch = torch.randn(32, 64, generator=data)
        targets = teacher(batch) + 0.5 * torch.randn(32, 8, generator=data)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(batch), targets).backward()
        optimizer.step()
        if step >= DROP_AT - 1:
            with torch.no_grad():
                loss = nn.functional.mse_loss(model(inputs), teacher(inputs)).item()
                pairs = zip(model.parameters(), before, strict=True)
                length = torch.stack([(p - q).norm() for p, q in pairs]).norm().item()
            curve.append((loss, length))
    return curve


def run(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """Run all treatments on one rank."""
    torch.set_num_threads(1)
    path = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=path, rank=rank, world_size=arguments.workers)
    if rank == 0:
        print("steps after the drop", *SHOWN)
    for treatment in TREATMENTS:
        curve = train(rank, treatment, arguments.quantizer, arguments.factor)
        if rank == 0:
            print(f"{treatment:9s} loss  ", *(f"{curve[at][0]:.4f}" for at in SHOWN))
            print(f"{treatment:9s} length", *(f"{curve[at][1]:.4f}" for at in SHOWN))
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantizer", default="lloyd2")
    parser.add_argument("--factor", type=float, default=30.0, help="divisor of the learning rate")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (arguments, folder), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
