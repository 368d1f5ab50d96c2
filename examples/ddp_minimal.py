"""DistributedDataParallel with 4-bit gradients: the marked line and its import are the change.

Two workers train one small network, each on its own data:

    torchrun --nproc-per-node 2 examples/ddp_minimal.py
    python examples/ddp_minimal.py                     # starts two workers
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach


def main(rank: int = -1, folder: str = "") -> None:
    if folder:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    else:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    student = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    ddp_model = DistributedDataParallel(student)
    state = attach(ddp_model, quantizer="lloyd4")  # <- the change
    optimizer = torch.optim.AdamW(ddp_model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())  # each worker draws its own data
    for step in range(1, 201):
        inputs = torch.randn(32, 64)
        loss = nn.functional.mse_loss(ddp_model(inputs), teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}, {state.stats()['ratio']:.2f}x fewer bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(main, (folder,), nprocs=2)
