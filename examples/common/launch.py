"""Start the workers of a data-parallel program on this machine, or join those of torchrun.

`launch` starts the workers as local processes, so that a single command trains with several of them.
They find one another through a file in a temporary directory, so no free port is needed. Under torchrun
the processes exist already, and `launch` only joins them.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Worker:
    """One process of the group.

    Attributes:
        rank: Rank of this worker, from 0.
        world_size: Number of workers.
        device: Device of this worker.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this worker prints and writes files."""
        return self.rank == 0


def under_torchrun() -> bool:
    """Return whether a launcher such as torchrun has started the workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(main: Callable[..., None], workers: int, device: str, *arguments: Any) -> None:
    """Run `main(worker, *arguments)` on every worker and return when all have ended.

    Args:
        main: Function at the top level of its module, as each new process imports it.
        workers: Number of local processes; ignored under torchrun, which sets the world size.
        device: "cpu", "cuda", or "auto" for CUDA if there is a GPU for each local worker.
        arguments: Picklable arguments of `main`.
    """
    if under_torchrun():
        world_size = int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        use_cuda = _use_cuda(device, local_workers)
        _join(int(os.environ["RANK"]), local_rank, world_size, "env://", use_cuda, main, arguments)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the machine's cores
    with tempfile.TemporaryDirectory(prefix="effadam-") as directory:
        init_method = f"file://{directory}/rendezvous"
        use_cuda = _use_cuda(device, workers)
        processes = spawn(
            _start,
            args=(workers, init_method, use_cuda, main, arguments),
            nprocs=workers,
            join=False,
        )
        try:
            while not processes.join():
                pass
        except KeyboardInterrupt:
            for process in processes.processes:
                process.terminate()
                process.join()
            sys.exit("Interrupted.")


def _use_cuda(device: str, local_workers: int) -> bool:
    if device == "auto":
        return torch.cuda.device_count() >= local_workers
    return device == "cuda"


def _start(
    rank: int,
    world_size: int,
    init_method: str,
    use_cuda: bool,
    main: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _join(rank, rank, world_size, init_method, use_cuda, main, arguments)


def _join(
    rank: int,
    local_rank: int,
    world_size: int,
    init_method: str,
    use_cuda: bool,
    main: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
    )
    main(Worker(rank, world_size, device), *arguments)
    dist.destroy_process_group()
