"""The ranks that torchrun has started: joining them, and what they share."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from effadam_hook.cli.rendezvous import check_command_lines
from effadam_hook.errors import CommandError
from effadam_hook.exchange.probe import Probe

__all__ = ["Ranks", "backend_for", "check_launched", "join_ranks", "pick_device", "rank_here"]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """The ranks of this run.

    Attributes:
        probe: What they measure together.
        device: Where this rank computes.
        backend: The process group's backend.
        neighbours: How many of them share this machine, this one included.
        cores: Cores that this rank's machine has for each of them.
    """

    probe: Probe
    device: torch.device
    backend: str
    neighbours: int
    cores: float

    @property
    def cpu_weight(self) -> float:
        """Seconds that a second of processor time takes from computing; none on a GPU."""
        return max(1.0, 1.0 / self.cores) if self.device.type == "cpu" else 0.0

    @property
    def on_nccl(self) -> bool:
        """Whether NCCL runs the collectives, and not Gloo."""
        return self.backend == "nccl"


def rank_here() -> int:
    """This process's rank, 0 if no launcher has said."""
    return int(os.environ.get("RANK", "0"))


def check_launched(command: str) -> None:
    """Check that a launcher has started this process, and not it alone.

    Args:
        command: Name of the subcommand, for the message.

    Raises:
        CommandError: If not, with the command line that would; or if it is the only rank.
    """
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise CommandError(
            f"`effadam {command}` measures between ranks, and {', '.join(missing)} is not set. "
            f"Start it on every host as you start training, for example: torchrun --nnodes 2 "
            f"--nproc-per-node 1 --rdzv-endpoint HOST:29500 -m effadam_hook.cli {command} ..."
        )
    if os.environ["WORLD_SIZE"] == "1":
        raise CommandError(
            "There is only one rank, and nothing to exchange. Start at least two, for example "
            "with torchrun --nproc-per-node 2."
        )


@contextlib.contextmanager
def join_ranks(args: argparse.Namespace) -> Iterator[Ranks]:
    """Join the process group that a launcher has prepared.

    Args:
        args: What this rank was asked; of it the subcommand's name, and the device: ``"cpu"``,
            ``"cuda"``, or ``"auto"``: CUDA if every local rank has a GPU.

    Yields:
        The ranks.

    Raises:
        CommandError: If there is no launcher's environment, or other ranks were asked otherwise.
    """
    check_launched(args.command)
    where = pick_device(args.device)
    backend = backend_for(where)
    store, rank, world_size = check_command_lines(args, where, backend)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        probe = Probe(group, where)
        machines = probe.share(_machine())
        neighbours = machines.count(machines[probe.rank])
        yield Ranks(probe, where, backend, neighbours, _cores() / neighbours)
    finally:
        dist.destroy_process_group()


def pick_device(device: str) -> torch.device:
    """The device of this rank.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.

    Raises:
        CommandError: If CUDA is asked for and not there.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = torch.cuda.device_count()
    if device == "cuda" and found < here:
        raise CommandError(
            f"--device cuda: {here} ranks run here and torch sees {found} GPUs. There must be one "
            "for each rank: start fewer, or take --device cpu."
        )
    if device == "cuda" or (device == "auto" and found >= here):
        return torch.device("cuda", local)
    return torch.device("cpu")


def backend_for(device: torch.device) -> str:
    """The backend of process groups whose tensors are on a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else os.uname().nodename
