"""The nodes of a process group, derived from the descriptions of all ranks.

Every rank derives the same table, or raises the same error. Hosts make the nodes: nothing follows from
the order of the ranks. Launchers are the check of host names, which two hosts may share. The boot and
the network namespace they cannot share: ranks that have both in common are on one node, however many
nodes their launchers count, as with two agents of torchrun on one host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.node_description import Description
from effadam_hook.exchange.topology import NodeTable
from effadam_hook.exchange.topology.node_table import list_ranks

__all__ = ["tabulate"]

_REMEDY = (
    "Correct the environment, name the nodes with intra_node_group= or device_mesh=, or use "
    'topology="sharded".'
)
_MOST_SHOWN = 8


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
        source = "host" + _launchers(groups, descriptions)
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
    """Compare the ranks of each host with what their launcher has set."""
    host_of: dict[tuple[str, int], tuple[str, int]] = {}
    for ranks in groups:
        known = {rank: descriptions[rank] for rank in ranks if descriptions[rank].launcher}
        _check_node_numbers(known, host_of)
        if not descriptions[ranks[0]].has_boot:
            _check_local_ranks(ranks, known)


def _check_node_numbers(
    known: Mapping[int, Description], host_of: dict[tuple[str, int], tuple[str, int]]
) -> None:
    """Check that a node of the launcher is one host, and a host known by name one node of it."""
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
        same_launcher = first[1].launcher == own.launcher
        if same_launcher and first[1].node != own.node and not own.has_boot:
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
                f"has set {own.local_world_size} on rank {rank}"
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


def _launchers(groups: Sequence[tuple[int, ...]], descriptions: Sequence[Description]) -> str:
    names = " and ".join(sorted({own.launcher for own in descriptions if own.launcher}))
    if not names:
        return ""
    counted = {(own.launcher, own.node) for own in descriptions if own.node is not None}
    if len(counted) > len(groups):
        return f" (not by {names}, which counts {len(counted)} nodes)"
    return f", as {names} says" if _all_agree(groups, descriptions) else f" (not by {names})"


def _all_agree(groups: Sequence[tuple[int, ...]], descriptions: Sequence[Description]) -> bool:
    """Return whether no host has more ranks than its launcher has set for one of them."""
    return all(
        len(ranks) <= (descriptions[rank].local_world_size or len(ranks))
        for ranks in groups
        for rank in ranks
    )
