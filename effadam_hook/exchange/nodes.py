"""Discovery of the nodes of a process group from the knowledge of its ranks.

A node is a host: ranks that share a host share its network card. Every rank describes itself:

- its *host identity*: host name, boot id and network namespace, or the environment variable
  ``EFFADAM_HOST`` where a host is to count as another one;
- what its *launcher* has told it: local rank, number of local ranks and number of the node, from
  torchrun (``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``GROUP_RANK``), Lightning (``LOCAL_RANK``,
  ``NODE_RANK``) or SLURM (``SLURM_LOCALID``, ``SLURM_NTASKS_PER_NODE``, ``SLURM_NODEID``);
- or the ranks of its node, where the user names them by a process group or a device mesh.

All descriptions are gathered, and every rank derives the same table from them or raises the same error.
Hosts make the nodes, launchers are the check: nothing follows from the order of the ranks.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh, members_of_node
from effadam_hook.exchange.topology import NodeTable
from effadam_hook.exchange.topology.node_table import list_ranks
from effadam_hook.exchange.waiting import gather_bytes

__all__ = [
    "HOST_VARIABLE",
    "Description",
    "describe_rank",
    "describe_ranks",
    "find_nodes",
    "tabulate",
]

HOST_VARIABLE = "EFFADAM_HOST"
"""Environment variable that replaces the host identity of a rank."""

_REMEDY = (
    "Correct the environment, name the nodes with intra_node_group= or device_mesh=, or use "
    'topology="sharded".'
)
_MOST_SHOWN = 8


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


def find_nodes(
    group: dist.ProcessGroup,
    device: torch.device,
    intra_node_group: IntraNodeGroup | None = None,
    device_mesh: NodeMesh | None = None,
) -> NodeTable:
    """Find the nodes of a process group; a collective operation.

    Args:
        group: The process group.
        device: Where the group's backend wants tensors.
        intra_node_group: The option of that name.
        device_mesh: The option of that name.

    Returns:
        The table, the same on every rank.

    Raises:
        EffAdamError: On every rank, if the ranks contradict one another, or cannot be described.
    """
    return tabulate(describe_ranks(group, device, intra_node_group, device_mesh))


def describe_ranks(
    group: dist.ProcessGroup,
    device: torch.device,
    intra_node_group: IntraNodeGroup | None = None,
    device_mesh: NodeMesh | None = None,
) -> list[Description]:
    """Gather the descriptions of all ranks; a collective operation.

    Args:
        group: The process group.
        device: Where the group's backend wants tensors.
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
    is_named = intra_node_group is not None or device_mesh is not None
    own = replace(own, is_named=is_named)
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


def tabulate(descriptions: Sequence[Description]) -> NodeTable:
    """Derive the table of the nodes from the descriptions of all ranks.

    Args:
        descriptions: By rank.

    Returns:
        The table.

    Raises:
        DisagreementError: If the ranks contradict one another.
        EffAdamError: If a rank cannot be described.
    """
    failed = [f"rank {rank}: {own.failure}" for rank, own in enumerate(descriptions) if own.failure]
    if failed:
        raise EffAdamError(
            f"The nodes cannot be found: {'; '.join(failed[:_MOST_SHOWN])} {_REMEDY}"
        )
    if any(own.members is not None for own in descriptions):
        groups, source = _named_by_user(descriptions), "intra_node_group or device_mesh"
    else:
        groups = _by_host(descriptions)
        _check_launchers(groups, descriptions)
        source = "host" + _launchers(descriptions)
    return NodeTable.of(groups, source, [own.name for own in descriptions])


def _named_by_user(descriptions: Sequence[Description]) -> list[tuple[int, ...]]:
    groups: dict[tuple[int, ...], None] = {}
    for rank, own in enumerate(descriptions):
        if own.members is None:
            raise DisagreementError(
                f"Rank {rank} has neither intra_node_group nor device_mesh, and other ranks have. "
                "Must be the same on all ranks."
            )
        groups[own.members] = None
        for member in own.members:
            if descriptions[member].members != own.members:
                raise DisagreementError(
                    f"The ranks name different nodes: rank {rank} is on a node with the ranks "
                    f"{list_ranks(own.members)}, rank {member} on one with "
                    f"{list_ranks(descriptions[member].members or ())}. Make intra_node_group or "
                    "device_mesh the same on all ranks."
                )
        if rank not in own.members:
            raise DisagreementError(
                f"The node of rank {rank} has the ranks {list_ranks(own.members)}, without rank "
                f"{rank}. intra_node_group and device_mesh must hold the rank itself."
            )
    return list(groups)


def _by_host(descriptions: Sequence[Description]) -> list[tuple[int, ...]]:
    hosts: dict[str, list[int]] = {}
    for rank, own in enumerate(descriptions):
        hosts.setdefault(own.host, []).append(rank)
    return [tuple(ranks) for ranks in hosts.values()]


def _check_launchers(
    groups: Sequence[tuple[int, ...]], descriptions: Sequence[Description]
) -> None:
    """Compare the ranks of each host with what their launcher has told them."""
    host_of: dict[tuple[str, int], tuple[str, int]] = {}
    for ranks in groups:
        known = {rank: descriptions[rank] for rank in ranks if descriptions[rank].launcher}
        _check_node_numbers(known, host_of)
        _check_local_ranks(ranks, known)


def _check_node_numbers(
    known: Mapping[int, Description], host_of: dict[tuple[str, int], tuple[str, int]]
) -> None:
    """Check that a node of the launcher is one host, and a host one node of the launcher."""
    first: tuple[int, Description] | None = None
    for rank, own in known.items():
        if own.node is None:
            continue
        host, other = host_of.setdefault((own.launcher, own.node), (own.host, rank))
        if host != own.host:
            raise _contradiction(
                f"rank {other} and rank {rank} are both on node {own.node} of {own.launcher}, and "
                "on different hosts"
            )
        first = first or (rank, own)
        if first[1].launcher == own.launcher and first[1].node != own.node:
            raise _contradiction(
                f"rank {first[0]} and rank {rank} are both on host {own.name!r}, and on the nodes "
                f"{first[1].node} and {own.node} of {own.launcher}"
            )


def _check_local_ranks(ranks: tuple[int, ...], known: Mapping[int, Description]) -> None:
    """Check that a host has no more ranks than the launcher has started, each with its own number."""
    owners: dict[int, int] = {}
    for rank, own in known.items():
        if own.local_world_size is not None and len(ranks) > own.local_world_size:
            raise _contradiction(
                f"host {own.name!r} has {len(ranks)} ranks ({list_ranks(ranks)}), and {own.launcher} "
                f"has told rank {rank} of {own.local_world_size} on it"
            )
        if own.local_rank is not None:
            other = owners.setdefault(own.local_rank, rank)
            if other != rank:
                raise _contradiction(
                    f"rank {other} and rank {rank} are both on host {own.name!r}, and have the local "
                    f"rank {own.local_rank}"
                )


def _contradiction(what: str) -> DisagreementError:
    return DisagreementError(f"Hosts and launchers disagree about the nodes: {what}. {_REMEDY}")


def _launchers(descriptions: Sequence[Description]) -> str:
    names = sorted({own.launcher for own in descriptions if own.launcher})
    return f", as {' and '.join(names)} says" if names else ""
