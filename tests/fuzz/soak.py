"""Ten thousand steps of a tiny model on three ranks, with delays and now and then an overflow.

python -m fuzz.soak --steps 10000
"""

from __future__ import annotations

import argparse
import resource
import sys
import threading
import time
import zlib
from typing import Any

import torch

from effadam_hook import attach
from fuzz.cases import Model
from harness import run_ranks
from training import ddp

__all__ = ["soak"]

SHAPES = ((37, 21), (300, 5), (64,), (9, 9, 9), (700,))


def soak(rank: int, world_size: int, steps: int, topology: str) -> dict[str, Any]:
    """Train, and say how it went.

    Args:
        rank: This rank.
        world_size: How many there are.
        steps: Number of steps.
        topology: Who is the server.
    """
    model = ddp(Model(SHAPES, torch.float32))
    state = attach(model, quantizer="lloyd2", topology=topology)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(rank)
    jitter = torch.Generator().manual_seed(100 + rank)
    skipped, memory_kb, began = 0, 0, time.monotonic()
    for step in range(steps):
        if step == steps // 10:
            memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chosen = [torch.randn(shape, generator=draw) for shape in SHAPES]
        if step % 997 == rank:
            chosen[step % len(SHAPES)].view(-1)[0] = torch.inf
        if torch.rand((), generator=jitter) < 0.01:
            time.sleep(1e-3)
        optimizer.zero_grad()
        model(chosen).backward()
        if all(bool(p.grad.isfinite().all()) for p in model.parameters()):
            optimizer.step()
        else:
            skipped += 1
    digest = 0
    for parameter in model.parameters():
        digest = zlib.crc32(parameter.detach().numpy().tobytes(), digest)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb
    return {
        "digest": digest,
        "steps": state.steps,
        "skipped": skipped,
        "residual": state.stats()["worker_residual_norm"],
        "grown_kb": grown_kb,
        "threads": threading.active_count(),
        "seconds": time.monotonic() - began,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--topology", default="rank0", choices=["rank0", "sharded"])
    arguments = parser.parse_args()
    ranks = run_ranks(soak, 3, arguments.steps, arguments.topology, timeout=3600)
    for rank, result in enumerate(ranks):
        print(rank, result)
    same = len({result["digest"] for result in ranks}) == 1
    finite = all(result["residual"] < float("inf") for result in ranks)
    print("replicas", "the same to the bit" if same else "DIFFER", "residuals finite", finite)
    return 0 if same and finite else 1


if __name__ == "__main__":
    sys.exit(main())
