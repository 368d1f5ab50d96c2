"""Measure the CPU time of the exchange's checks as a share of the CPU time of the whole step.

    python benchmarks/overhead.py --workers 2 --steps 30

The checks are: checksums of payloads, the comparison of weights, the search for parameters without a
gradient, the list of in-flight buckets, the watchdog thread, and the check of gradient accumulation.
CPU time is used instead of wall-clock time, so that other load on the machine does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach
from effadam_hook.ddp.accumulation import AccumulationCheck
from effadam_hook.exchange.replica_check import ReplicaCheck
from effadam_hook.exchange.watchdog.flight_record import FlightRecord
from effadam_hook.exchange.watchdog.monitor import Monitor
from effadam_hook.exchange.watchdog.watchdog import Watchdog
from effadam_hook.kernels.unused import Unused

CHECKS: tuple[tuple[type, str], ...] = (
    (ReplicaCheck, "stamp"),
    (ReplicaCheck, "write"),
    (ReplicaCheck, "check"),
    (Unused, "_find"),
    (AccumulationCheck, "begin"),
    (AccumulationCheck, "end"),
    (Watchdog, "enter"),
    (FlightRecord, "finished"),
    (Monitor, "_round"),
)


class Meter:
    """Sum of the CPU times of the checks, on all threads."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def watch(self, owner: type, name: str) -> None:
        """Replace a method by one that measures its CPU time."""
        original: Callable[..., Any] = getattr(owner, name)
        label = f"{owner.__name__}.{name}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                with self._lock:
                    self.spent_s[label] = self.spent_s.get(label, 0.0) + spent

        setattr(owner, name, timed)


def run(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=arguments.workers,
    )
    torch.set_num_threads(1)
    layers = [
        layer
        for _ in range(arguments.layers)
        for layer in (nn.Linear(arguments.width, arguments.width), nn.ReLU())
    ]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=arguments.bucket_mb)
    state = attach(model, quantizer="lloyd4", topology=arguments.topology)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    meter = Meter()
    for owner, name in CHECKS:
        meter.watch(owner, name)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(32, arguments.width)).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        step()
    meter.spent_s.clear()
    start = time.process_time()
    for _ in range(arguments.steps):
        step()
    total_s = time.process_time() - start
    if rank == 0:
        numel = sum(p.numel() for p in model.parameters())
        kernels = state.summary().partition("kernels")[2].split("\n")[0].strip()
        print(
            f"{arguments.workers} workers, {numel / 1e6:.1f} M parameters, "
            f"{len(state.session.buckets)} buckets, {arguments.topology}, kernels {kernels}, "
            f"{arguments.steps} steps"
        )
        for label, spent_s in sorted(meter.spent_s.items()):
            per_step = 1e6 * spent_s / arguments.steps
            print(f"{label:28} {per_step:8.1f} us a step {100 * spent_s / total_s:8.3f} %")
        checks_s = sum(meter.spent_s.values())
        print(f"{'step':28} {1e6 * total_s / arguments.steps:8.1f} us")
        print(f"{'all checks':28} {'':19} {100 * checks_s / total_s:8.3f} %")
    dist.barrier()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--bucket-mb", type=float, default=4.0)
    parser.add_argument("--topology", default="sharded", choices=["rank0", "sharded"])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, args=(arguments, folder), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
