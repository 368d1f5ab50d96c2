"""Write the saved states of version 0.1.0 that `test_saved.py` loads.

Run once, with the package of the commit that 0.1.0 was released from (1f97514), in an empty folder::

    git worktree add ../old 1f97514 && cp effadam_hook/kernels/_cpu*.so ../old/effadam_hook/kernels/
    PYTHONPATH=../old python tests/data/make_states.py tests/data

Every file holds what two ranks saved after five steps, the weights of that moment, and those that
the same program had three steps later::

    {"full": state.full_state_dict(), "model": ..., "later": ...}

A rank's own state is `full["ranks"][rank]`. The names of `state_0_1_0_sharded` are those of a compiled
model, with the prefix `_orig_mod.`; those of the other files are plain.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, attach

CASES = ("rank0", "sharded", "update")
BLOCK_SIZE, SAVED_AT, ENDS_AT = 16, 5, 8


class Net(nn.Module):
    """Three layers of odd sizes, declared in any order."""

    def __init__(self, order: str = "abc") -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {"a": nn.Linear(7, 13), "b": nn.Linear(13, 9), "c": nn.Linear(9, 5)}
        for name in order:
            setattr(self, name, layers[name])

    def forward(self, x: Tensor) -> Tensor:
        """All layers, a then b then c."""
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def make_optimizer(case: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a case trains with."""
    if case == "update":
        return EfficientAdam(model.parameters(), lr=1e-3, second_moment="local")
    return torch.optim.SGD(model.parameters(), lr=0.05)


def options_of(case: str, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """The options of `attach` that a case trains with."""
    options = {"quantizer": "lloyd2", "block_size": BLOCK_SIZE}
    options["topology"] = "rank0" if case == "rank0" else "sharded"
    return {**options, "optimizer": optimizer} if case == "update" else options


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    """Take some steps on data that differs by rank."""
    for step in steps:
        batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def save(rank: int, folder: str, case: str, store: str) -> None:
    """Train on one of two ranks and write a file on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = Net()
    compiled = torch.compile(net, backend="eager") if case == "sharded" else net
    # The DDPOptimizer of torch.compile wants larger buckets than this model has.
    model = DistributedDataParallel(compiled, bucket_cap_mb=25 if case == "sharded" else 0.001)
    optimizer = make_optimizer(case, model)
    state = attach(model, **options_of(case, optimizer))
    train(model, optimizer, rank, range(SAVED_AT))
    saved = {
        "full": state.full_state_dict(),
        "model": {name: value.clone() for name, value in net.state_dict().items()},
    }
    train(model, optimizer, rank, range(SAVED_AT, ENDS_AT))
    if rank == 0:
        saved["later"] = net.state_dict()
        torch.save(saved, Path(folder) / f"state_0_1_0_{case}.state")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            mp.spawn(save, (sys.argv[1], name, f"{scratch}/store"), nprocs=2)
