"""Start the workers of a data-parallel program on this machine, or join those of torchrun.

A single command should be enough to see several workers train together. `launch` starts them as
local processes that meet through a file in a temporary directory, so no port has to be chosen or
free. Under torchrun the processes exist already, and the same program only joins them.
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
        rank: this worker's number, from 0.
        world_size: how many workers there are.
        device: where this worker computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that prints and writes files."""
        return self.rank == 0


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun has already started the workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(main: Callable[..., None], workers: int, device: str, *arguments: Any) -> None:
    """Run `main(worker, *arguments)` in every worker and return when all are done.

    Args:
        main: a function at the top level of its module (it is looked up again in each new process).
        workers: how many local processes to start; under torchrun, its world size is used instead.
        device: "cpu", "cuda", or "auto" (CUDA when there is a GPU for each local worker).
        arguments: picklable values handed to `main`.
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
        meeting_point = f"file://{directory}/rendezvous"
        use_cuda = _use_cuda(device, workers)
        processes = spawn(
            _start,
            args=(workers, meeting_point, use_cuda, main, arguments),
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
    meeting_point: str,
    use_cuda: bool,
    main: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _join(rank, rank, world_size, meeting_point, use_cuda, main, arguments)


def _join(
    rank: int,
    local_rank: int,
    world_size: int,
    meeting_point: str,
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
        init_method=meeting_point,
        rank=rank,
        world_size=world_size,
    )
    main(Worker(rank, world_size, device), *arguments)
    dist.destroy_process_group()
