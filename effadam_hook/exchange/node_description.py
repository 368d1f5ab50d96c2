"""Descriptions of the ranks of a process group, from which the nodes follow.

A node is a host: ranks that share a host share its network card. Every rank describes itself:

- its *host identity*: host name, boot id and network namespace, or the environment variable
  ``EFFADAM_HOST`` where a host is to count as another one;
- what its *launcher* has set: local rank, number of local ranks and number of the node, from
  torchrun (``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``GROUP_RANK``), Lightning (``LOCAL_RANK``,
  ``NODE_RANK``) or SLURM (``SLURM_LOCALID``, ``SLURM_NTASKS_PER_NODE``, ``SLURM_NODEID``);
- or the ranks of its node, where the user names them by a process group or a device mesh.

All descriptions are gathered on every rank; :mod:`effadam_hook.exchange.nodes` derives the nodes.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh, members_of_node
from effadam_hook.exchange.waiting import gather_bytes

__all__ = [
    "HOST_VARIABLE",
    "Description",
    "describe_rank",
    "describe_ranks",
]

HOST_VARIABLE = "EFFADAM_HOST"
"""Environment variable that replaces the host identity of a rank."""


@dataclass(frozen=True)
class Description:
    """Description of the node of a rank, from its own knowledge.

    Attributes:
        host: Identity of the host.
        name: Name of the host, for messages.
        launcher: Name of the launcher; empty if the rank knows of none.
        local_rank: Index among the local ranks of the launcher; None if unknown.
        local_world_size: Number of these; None if unknown.
        node: Number of the node; None if unknown.
        members: Ranks of the node in the process group, as the user names them; None to find out.
        failure: The reason for which this rank has no description; empty if it has one.
        is_named: Whether the user names the nodes, so that they must be known.
    """

    host: str
    name: str
    launcher: str = ""
    local_rank: int | None = None
    local_world_size: int | None = None
    node: int | None = None
    members: tuple[int, ...] | None = None
    failure: str = ""
    is_named: bool = False

    @property
    def has_boot(self) -> bool:
        """Return whether the identity holds boot and network namespace, which no other host has."""
        return self.host != self.name


def describe_ranks(
    group: dist.ProcessGroup,
    device: torch.device,
    intra_node_group: IntraNodeGroup | None = None,
    device_mesh: NodeMesh | None = None,
) -> list[Description]:
    """Gather the descriptions of all ranks; a collective operation.

    Args:
        group: The process group.
        device: A device whose tensors the group can send.
        intra_node_group: The option of that name.
        device_mesh: The option of that name.

    Returns:
        The descriptions, by rank.
    """
    own: Description
    try:
        members = members_of_node(group, intra_node_group, device_mesh)
        own = describe_rank(os.environ, dist.get_rank(), dist.get_world_size(), members)
    except Exception as error:  # the other ranks must not wait for this one
        own = Description("", "", failure=str(error) or type(error).__name__)
    own = replace(own, is_named=intra_node_group is not None or device_mesh is not None)
    data = json.dumps(asdict(own)).encode()
    rows = [json.loads(text) for text in gather_bytes(data, group, device, everywhere=True)]
    return [_read(row) for row in rows]


def _read(row: dict[str, Any]) -> Description:
    members = row.pop("members")
    return Description(**row, members=None if members is None else tuple(members))


def describe_rank(
    environment: Mapping[str, str],
    rank: int,
    world_size: int,
    members: tuple[int, ...] | None = None,
) -> Description:
    """Describe this rank.

    Args:
        environment: The environment variables.
        rank: This rank in the default group. A launcher's variables count only if they mean this
            rank: a process that was started within a launcher's process inherits them.
        world_size: Size of the default group.
        members: Ranks of the node, if the user names them.

    Raises:
        EffAdamError: If a variable is no whole number.
    """
    name = socket.gethostname()
    host = environment.get(HOST_VARIABLE) or _host_identity(name)
    if HOST_VARIABLE in environment:
        name = environment[HOST_VARIABLE] or name

    def number(key: str) -> int | None:
        text = environment.get(key)
        if text is None:
            return None
        if not text.isdecimal():
            raise EffAdamError(
                f"The environment variable {key} is {text!r}. Must be a whole number."
            )
        return int(text)

    if "LOCAL_RANK" in environment and _means(number, "RANK", "WORLD_SIZE", rank, world_size):
        node = number("GROUP_RANK")
        return Description(
            *(host, name, "torchrun" if node is not None else "the launcher"),
            *(number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE")),
            number("NODE_RANK") if node is None else node,
            members,
        )
    if "SLURM_LOCALID" in environment and _means(
        number, "SLURM_PROCID", "SLURM_NTASKS", rank, world_size
    ):
        local, tasks = number("SLURM_LOCALID"), number("SLURM_NTASKS_PER_NODE")
        return Description(host, name, "SLURM", local, tasks, number("SLURM_NODEID"), members)
    return Description(host, name, members=members)


def _means(
    number: Callable[[str], int | None], rank_key: str, size_key: str, rank: int, size: int
) -> bool:
    """Return whether a launcher's variables are those of this rank, as far as they say."""
    return number(rank_key) in (None, rank) and number(size_key) in (None, size)


def _host_identity(name: str) -> str:
    """Host name, boot and network namespace: those of another host differ in one of them."""
    parts = [name]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/net").readlink()))
    except OSError:  # not Linux
        pass
    return " ".join(parts)
