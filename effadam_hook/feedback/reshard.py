"""Saved states of other ranks and other shares.

For another number of ranks the states of all ranks are merged. Every new worker starts with the mean of
the old workers' residuals, which the invariants of the algorithm are about, and the servers' residuals
are concatenated and dealt to the new servers.

The elements that a rank serves may change on the same number of ranks too, as they do with another
topology or block size, and after version 1, whose shares depended on the order of the parameters:

- a state of all ranks is dealt exactly;
- in the state of one rank, the elements that the rank no longer serves move into its worker residual,
  as the other ranks' states are not available. The conserved sum is ẽ + (1/N) Σ e_i, so that they move
  N times.

If nodes are the workers (hierarchical topology), N is the number of nodes, and the residual of a
node is divided among its ranks by share. The state of one rank then fits the same nodes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effadam_hook.errors import StateMismatchError
from effadam_hook.feedback.checkpoint import RankState, Share
from effadam_hook.feedback.moments import MOMENTS
from effadam_hook.feedback.schema import reject
from effadam_hook.wire.node_shares import NodeShare, position_of
from effadam_hook.wire.shares import share_of, turn_of, unit_of

__all__ = ["Role", "deal", "merge", "reassign"]


@dataclass(frozen=True)
class Role:
    """Role of a rank in a run.

    Attributes:
        rank: Rank in the process group.
        world_size: Number of ranks.
        serves: Index of the server that this rank is; None if it is none.
        servers: Number of servers.
        block_size: Number of elements that share a scale.
        nodes: Ranks of every node, if nodes are the workers; None if ranks are.
        shares: Number of ranks that divide a worker's residual among themselves.
        local_rank: Index of this rank among them.
        exact: Names of the parameters that are sent uncompressed.
    """

    rank: int
    world_size: int
    serves: int | None
    servers: int
    block_size: int
    nodes: tuple[tuple[int, ...], ...] | None = None
    shares: int = 1
    local_rank: int = 0
    exact: frozenset[str] = frozenset()

    def share(self, name: str, numel: int) -> tuple[int, int]:
        """Return the first element and the number of elements that this rank serves of a parameter.

        Args:
            name: Name of the parameter.
            numel: Its number of elements.
        """
        if self.serves is None:
            return 0, 0
        position = position_of(self.serves, turn_of(name), self.servers, self.shares)
        unit = unit_of(name in self.exact, self.block_size)
        return share_of(numel, 0, unit, position, self.servers)

    def worker_share(self, name: str, numel: int) -> tuple[int, int]:
        """Return the first element and the number of elements of this rank's worker residual.

        Args:
            name: Name of the parameter.
            numel: Its number of elements.
        """
        return self._share_of(self.local_rank).of(name, numel)

    def _share_of(self, local_rank: int) -> NodeShare:
        return NodeShare(local_rank, self.shares, self.servers, self.block_size, self.exact)

    def has_workers_of(self, state: RankState, numels: Mapping[str, int]) -> bool:
        """Return whether the rank of a state holds the worker residuals of the same rank now.

        Args:
            state: The state.
            numels: Number of elements of the model's parameters by name, as far as they are known.
        """
        if (state.world_size, state.nodes) != (self.world_size, self.nodes):
            return False
        if self.nodes is None:
            return True
        (local_rank,) = (node.index(state.rank) for node in self.nodes if state.rank in node)
        share = self._share_of(local_rank)
        return state.block_size == self.block_size and all(
            (state.worker_start[name], values.numel()) == share.of(name, numels[name])
            for name, values in state.worker.items()
            if name in numels
        )


def merge(states: Sequence[RankState]) -> RankState:
    """Merge the states of all ranks into one from which any number of ranks can start.

    Args:
        states: States of all ranks, in their order.

    Returns:
        The state of a single rank and server: the mean of the workers' residuals and moments, and the
        servers' residuals of whole parameters.

    Raises:
        StateMismatchError: If the states are not those of all ranks of one run.
    """
    for rank, state in enumerate(states):
        if state.rank != rank or state.world_size != len(states):
            raise StateMismatchError(
                f"State {rank} of {len(states)} is that of rank {state.rank} of "
                f"{state.world_size}. Must be the states of all ranks, in order."
            )
        if state.nodes != states[0].nodes:
            raise StateMismatchError(
                f"The states of rank 0 and rank {rank} have the nodes {states[0].nodes} and "
                f"{state.nodes}. Must be the states of all ranks of one run."
            )
    ranks = len(states)
    names = _names(state.worker for state in states)
    if states[0].nodes is not None:
        worker = {name: _mean_of_nodes(name, states, len(states[0].nodes)) for name in names}
    else:
        worker = {
            name: _mean(
                "worker residual", name, [s.worker[name] for s in states if name in s.worker], ranks
            )
            for name in names
        }
    server = {
        name: _whole(name, [s.server[name] for s in states if name in s.server], worker[name])
        for name in _names(state.server for state in states)
    }
    moments = {}
    for name in _names(state.moments for state in states):
        entries = [state.moments[name] for state in states if name in state.moments]
        if len(entries) < ranks:
            raise StateMismatchError(
                f"The saved moments of {name!r} are those of {len(entries)} of {ranks} ranks. Must be "
                "the states of all ranks at one step: use another checkpoint."
            )
        moments[name] = {**entries[0], **_mean_moments(name, entries)}
    return replace(
        states[0],
        rank=0,
        world_size=1,
        servers=1,
        worker=worker,
        server={name: Share(0, whole) for name, whole in server.items()},
        moments=moments,
        nodes=None,
        worker_start={},
    )


def _names(tables: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _mean(what: str, name: str, held: Sequence[Tensor], ranks: int) -> Tensor:
    """Return the mean over all ranks; a rank without a tensor counts as zero."""
    sizes = sorted({values.numel() for values in held})
    if len(sizes) > 1:
        raise StateMismatchError(
            f"The saved {what} of {name!r} has {sizes[0]} elements on one rank and {sizes[-1]} on "
            "another. Must be the states of all ranks of one run."
        )
    return (torch.stack([values.double() for values in held]).sum(dim=0) / ranks).to(held[0].dtype)


def _mean_moments(name: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean moments of a parameter, whole: of every element over the ranks that hold it."""
    parts = sum("start" in entry for entry in entries)
    if parts == 0:
        return {key: _mean(key, name, [e[key] for e in entries], len(entries)) for key in MOMENTS}
    if parts < len(entries):
        raise StateMismatchError(
            f"The saved moments of {name!r} are shares on {parts} of {len(entries)} ranks. Must be so "
            "on all ranks or on none: use another checkpoint."
        )
    spans = [slice(e["start"], e["start"] + e[MOMENTS[0]].numel()) for e in entries]
    holders = torch.zeros(max(span.stop for span in spans), dtype=torch.int64)
    for span in spans:
        holders[span] += 1
    if not bool(holders.all()):
        reject(f"moments.{name}.start", [s.start for s in spans], "those of shares without gaps")
    means: dict[str, Any] = {"start": 0}
    for key in MOMENTS:
        total = torch.zeros(len(holders), dtype=torch.float64)
        for span, entry in zip(spans, entries, strict=True):
            total[span] += entry[key].double()
        means[key] = (total / holders).to(entries[0][key].dtype)
    return means


def _mean_of_nodes(name: str, states: Sequence[RankState], nodes: int) -> Tensor:
    """Return the mean over all nodes, whose ranks hold shares; missing elements count as zero."""
    held = [(s.worker_start[name], s.worker[name]) for s in states if name in s.worker]
    numel = max(start + values.numel() for start, values in held)
    total = torch.zeros(numel, dtype=torch.float64)
    for start, values in held:
        total[start : start + values.numel()] += values.double()
    return (total / nodes).to(held[0][1].dtype)


def _whole(name: str, shares: Sequence[Share], worker: Tensor) -> Tensor:
    """Concatenate the servers' residuals of a parameter."""
    ordered = sorted(shares, key=lambda share: share.start)
    starts = [share.start for share in ordered]
    ends = [share.end for share in ordered]
    if starts != [0, *ends[:-1]] or ends[-1] != worker.numel():
        reject(
            f"server_start.{name}", starts, "those of shares without gaps, of the whole parameter"
        )
    return torch.cat([share.values for share in ordered])


def deal(merged: RankState, role: Role) -> RankState:
    """Give a rank its part of a merged state.

    Args:
        merged: State with the server residuals of whole parameters, as :func:`merge` returns it.
        role: Role of the rank in the new run.
    """
    server = {}
    for name, whole in merged.server.items():
        first, numel = role.share(name, whole.values.numel())
        if numel:
            server[name] = Share(first, whole.values[first : first + numel])
    if role.nodes is not None:
        worker, start = {}, {}
        for name, values in merged.worker.items():
            first, numel = role.worker_share(name, values.numel())
            if numel:
                worker[name], start[name] = values[first : first + numel], first
        merged = replace(merged, worker=worker, nodes=role.nodes, worker_start=start)
    return replace(
        merged,
        rank=role.rank,
        world_size=role.world_size,
        servers=role.servers,
        block_size=role.block_size,
        server=server,
    )


def reassign(state: RankState, role: Role, sign: int) -> RankState:
    """Fit the state of a rank to the elements that the rank serves now, without loss.

    Args:
        state: State of the same rank, of the same number of ranks.
        role: Role of the rank now.
        sign: 1 if a server's residual adds to a worker's, -1 if it subtracts.

    Returns:
        The state with the present shares. Residuals of other elements are in the worker residual.
    """
    worker = dict(state.worker)
    server: dict[str, Share] = {}
    for name, residual in state.worker.items():
        first, numel = role.share(name, residual.numel())
        held = state.server.get(name)
        if held is not None and (held.start, held.values.numel()) == (first, numel):
            server[name] = held
            continue
        whole = torch.zeros_like(residual)
        if held is not None:
            whole[held.start : held.end] = held.values
        if numel:
            server[name] = Share(first, whole[first : first + numel].clone())
        if held is not None:
            whole[first : first + numel] = 0
            worker[name] = residual + whole * (sign * state.world_size)
    return replace(
        state, servers=role.servers, block_size=role.block_size, worker=worker, server=server
    )
