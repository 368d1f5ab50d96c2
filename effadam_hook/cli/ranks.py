"""Ranks that a launcher such as torchrun has started: process group, device and cores."""

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
from torch.distributed import HashStore  # type: ignore[attr-defined]

from effadam_hook.cli.rendezvous import check_command_lines
from effadam_hook.errors import CommandError
from effadam_hook.exchange.node_description import describe_ranks
from effadam_hook.exchange.nodes import tabulate
from effadam_hook.exchange.probe import Probe
from effadam_hook.exchange.topology import NodeTable

__all__ = [
    "Ranks",
    "alone",
    "backend_for",
    "check_launched",
    "is_launched",
    "join_ranks",
    "overload",
    "pick_device",
    "rank_here",
]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """Ranks of this run.

    Attributes:
        probe: Probe that measures between the ranks.
        device: Device of this rank.
        backend: Backend of the process group.
        neighbours: Number of ranks on this machine, including this rank.
        cores: Number of cores per rank on this machine.
        nodes: The nodes of the ranks; None if they were not looked up.
    """

    probe: Probe
    device: torch.device
    backend: str
    neighbours: int
    cores: float
    nodes: NodeTable | None = None

    @property
    def ranks_per_node(self) -> int:
        """Return the number of ranks that share a network card; 1 if all ranks are on one node."""
        return 1 if self.nodes is None or self.is_local else self.nodes.ranks_per_node

    @property
    def is_alone(self) -> bool:
        """Return whether this is the only rank, so that no link can be measured."""
        return self.probe.world_size == 1

    @property
    def is_local(self) -> bool:
        """Return whether all ranks are on one node, so that nothing passes through a network."""
        return self.nodes is not None and len(self.nodes.nodes) == 1

    @property
    def cpu_weight(self) -> float:
        """Return the seconds of computing that a second of processor time displaces; 0 on a GPU."""
        return max(1.0, 1.0 / self.cores) if self.device.type == "cpu" else 0.0

    @property
    def on_nccl(self) -> bool:
        """Return whether the backend is NCCL instead of Gloo."""
        return self.backend == "nccl"


def overload() -> float | None:
    """Return the load of this machine, if it is higher than its number of cores.

    Returns:
        Mean number of processes that ran or waited for a core during the last minute. None if every
        one of them had a core, or if the system does not count them.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    load = os.getloadavg()[0]
    return load if load > (os.cpu_count() or 1) else None


def rank_here() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Return whether a launcher has started this process."""
    return all(name in os.environ for name in _NEEDED)


def check_launched(command: str, otherwise: str = "") -> None:
    """Check that a launcher has started this process and at least one other.

    Args:
        command: Name of the subcommand, for the message.
        otherwise: What to do without a launcher, for the message.

    Raises:
        CommandError: If there is no launcher's environment, or only one rank.
    """
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        are_missing = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        raise CommandError(
            f"`effadam {command}` measures between ranks, and the environment's {are_missing}. "
            f"Start it on every host in the way you start training, for example: torchrun --nnodes 2 "
            f"--nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m effadam_hook "
            f"{command} ... (HOST is one of the hosts, the same in every command)"
            f"{otherwise and f'; {otherwise}'}"
        )
    if os.environ["WORLD_SIZE"] == "1":
        raise CommandError(
            "There is only one rank, so there is nothing to exchange. Start at least two, for example "
            "with torchrun --nproc-per-node 2."
        )


@contextlib.contextmanager
def join_ranks(args: argparse.Namespace) -> Iterator[Ranks]:
    """Join the process group of the launcher's ranks.

    Args:
        args: Arguments of the command. ``args.device`` is ``"cpu"``, ``"cuda"``, or ``"auto"`` for CUDA
            if every local rank has a GPU.

    Yields:
        The ranks.

    Raises:
        CommandError: If there is no launcher's environment, or the ranks' arguments differ.
    """
    check_launched(args.command)
    device = pick_device(args.device)
    backend = backend_for(device)
    store, rank, world_size = check_command_lines(args, device, backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        nodes = _nodes(group, device)
        probe = Probe(group, device, nodes if len(nodes.nodes) > 1 else None)
        machines = probe.share(_machine())
        neighbours = machines.count(machines[probe.rank])
        yield Ranks(probe, device, backend, neighbours, _cores() / neighbours, nodes)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def alone(args: argparse.Namespace) -> Iterator[Ranks]:
    """Make a process group of this process, to measure its arithmetic without a launcher.

    Args:
        args: Arguments of the command; ``args.device`` as in :func:`join_ranks`.

    Yields:
        The one rank, with one thread and a core of its own, as torchrun starts ranks.
    """
    is_calculated = args.copy_gbyte is not None  # for GPUs of other machines
    device = torch.device("cpu") if is_calculated else pick_device(args.device)
    backend = backend_for(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield Ranks(Probe(group, device), device, backend, neighbours=1, cores=1.0)
    finally:
        dist.destroy_process_group()


def _nodes(group: dist.ProcessGroup, device: torch.device) -> NodeTable:
    """Find the nodes of the ranks; a collective operation.

    Raises:
        CommandError: On every rank, if nodes have unequal numbers of ranks.
        EffAdamError: On every rank, if hosts and launchers disagree.
    """
    table = tabulate(describe_ranks(group, device))
    counts = {len(ranks) for ranks in table.nodes}
    if len(counts) > 1:
        raise CommandError(
            f"The hosts have unequal numbers of ranks, between {min(counts)} and {max(counts)}. The "
            "cost model needs equally many: start as many ranks on every host."
        )
    return table


def pick_device(device: str) -> torch.device:
    """Select the device of this rank.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.

    Returns:
        The device.

    Raises:
        CommandError: If ``device`` is ``"cuda"`` and there are fewer GPUs than local ranks.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < here:
        raise CommandError(
            f"--device cuda: {here} ranks run on this machine and torch reports {gpus} GPUs. Every "
            "rank needs its own GPU: start fewer ranks, or use --device cpu."
        )
    if device == "cuda" or (device == "auto" and gpus >= here):
        return torch.device("cuda", local)
    return torch.device("cpu")


def backend_for(device: torch.device) -> str:
    """Return the backend of process groups whose tensors are on a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else os.uname().nodename
