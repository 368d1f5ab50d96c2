"""Saving and restoring of a session: residuals, moments and counters of this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from effadam_hook.errors import StateMismatchError, warn_caller
from effadam_hook.exchange.topology import Topology, make_topology
from effadam_hook.feedback.checkpoint import RankState, Share, holds_all_ranks, read_states
from effadam_hook.feedback.reshard import Role, deal, merge, reassign
from effadam_hook.session.session import ExchangeSession

__all__ = ["capture", "restore", "role_of"]


def capture(session: ExchangeSession) -> RankState:
    """Return the state of this rank.

    Args:
        session: The session.

    Returns:
        The state, with copies of all tensors on the CPU. Residuals have the scale of the unscaled loss.
    """
    session.settle()
    connection, topology, scale = session.connection, session.topology, session.loss_scale.value
    role = role_of(session, topology)
    worker = {name: (view / scale).cpu() for name, view in session.worker}
    server = {name: (view / scale).cpu() for name, view in session.server}
    return RankState(
        rank=role.rank,
        world_size=role.world_size,
        topology=topology.name if connection.choice.is_made else "",
        servers=role.servers,
        block_size=role.block_size,
        counters=replace(session.counters),
        units=session.mode.units,
        worker=worker,
        server={name: Share(session.server.offset(name), v) for name, v in server.items()},
        moments={
            name: {key: v.cpu() if isinstance(v, Tensor) else v for key, v in values.items()}
            for name, values in session.mode.save().items()
        },
        config=session.config.to_dict(),
        nodes=role.nodes,
        worker_start={name: session.worker.offset(name) for name in worker} if role.nodes else {},
    )


def restore(session: ExchangeSession, saved: Any) -> None:
    """Continue from a saved state, of this rank or of all ranks.

    Args:
        session: The session; unchanged if an error is raised.
        saved: A dictionary of :meth:`EfficientAdamState.state_dict` or
            :meth:`EfficientAdamState.full_state_dict`.

    Raises:
        StateMismatchError: If the state is damaged, or does not fit the model, the mode or the ranks.
    """
    states = read_states(saved)
    name = _topology_after(session, states[0])
    state = _state_of_this_rank(session, saved, states, name)
    session.settle()
    session.connection.choice.follow(name)
    session.blocks.follow(state.block_size)
    session.mode.load(state.moments)
    session.loss_scale.reset()
    session.counters = replace(state.counters)
    if session.config.error_feedback:
        device = session.parameters.device()
        session.worker.load(state.worker, device, state.worker_start)
        server = {name: share.values for name, share in state.server.items()}
        starts = {name: share.start for name, share in state.server.items()}
        session.server.load(server, device, starts)
    elif state.worker:
        warn_caller(
            "The saved state has residuals, and error_feedback is off: they are dropped.",
        )


def role_of(session: ExchangeSession, topology: Topology, block_size: int | None = None) -> Role:
    """Return the role of this rank in a topology.

    Args:
        session: The session.
        topology: Its topology, or the one that a saved state decides for.
        block_size: Block size that a saved state decides for; None for that of the session.
    """
    table = session.connection.choice.table
    return Role(
        rank=session.group.rank(),
        world_size=session.group.size(),
        serves=topology.serves,
        servers=topology.servers,
        block_size=block_size or session.blocks.value,
        nodes=table.nodes if table is not None and topology.shares > 1 else None,
        shares=topology.shares,
        local_rank=topology.share,
        exact=session.parameters.exact(session.config),
    )


def _topology_after(session: ExchangeSession, state: RankState) -> str:
    """Return the topology in which a saved state continues; empty to leave the choice as it is."""
    connection = session.connection
    if connection.exchange is not None:
        return ""
    return connection.choice.name_after(state.topology, state.world_size, session.group)


def _block_size_after(session: ExchangeSession, state: RankState) -> int:
    """Return the block size with which a saved state continues."""
    if session.connection.exchange is not None:
        return session.blocks.value
    return session.blocks.value_after(state.block_size, state.world_size == session.group.size())


def _state_of_this_rank(
    session: ExchangeSession, saved: Any, states: list[RankState], name: str
) -> RankState:
    """Check a saved state against the session, and return this rank's part."""
    parameters, mode = session.parameters, session.mode
    states = [state.renamed(parameters.resolve) for state in states]
    topology = make_topology(name, session.group) if name else session.topology
    role = role_of(session, topology, _block_size_after(session, states[0]))
    numels = parameters.numels()
    own = _dealt(states, role, numels) if holds_all_ranks(saved) else _own(states[0], role, numels)
    _check_parameters(session, own)
    if own.units and own.units != mode.units:
        raise StateMismatchError(
            f"The saved residuals are those of {own.units}, and this state exchanges {mode.units}. "
            "Load a state of the same mode, or none: residuals then start at zero."
        )
    if not holds_all_ranks(saved) and role.nodes is None:
        own = reassign(own, role, mode.server_sign)
    own.check_residuals(session.worker, session.server)
    return own


def _dealt(states: list[RankState], role: Role, numels: Mapping[str, int]) -> RankState:
    """Deal the states of all ranks to this rank; with the same workers, every worker keeps its own."""
    merged = merge(states)
    if all(role.has_workers_of(state, numels) for state in states):
        if role.nodes is not None:
            return states[role.rank]
        merged = replace(states[role.rank], server=merged.server)
    return deal(merged, role)


def _own(state: RankState, role: Role, numels: Mapping[str, int]) -> RankState:
    if (state.rank, state.world_size) != (role.rank, role.world_size):
        raise StateMismatchError(
            f"The saved state is that of rank {state.rank} of {state.world_size}; this is rank "
            f"{role.rank} of {role.world_size}. Load each rank's own state, or one of all ranks from "
            "full_state_dict()."
        )
    if not role.has_workers_of(state, numels):
        raise StateMismatchError(
            f"The saved state has the nodes {state.nodes}, blocks of {state.block_size} and "
            f"exact={state.config.get('exact')}, this run {role.nodes}, blocks of {role.block_size} "
            f"and {len(role.exact)} exact parameters. The state of one rank with "
            "topology='hierarchical' fits the same nodes, blocks and exact parameters only: load one "
            "of all ranks from full_state_dict()."
        )
    return state


def _check_parameters(session: ExchangeSession, state: RankState) -> None:
    parameters = session.parameters
    if parameters.bound:
        if numels := parameters.numels():
            state.check_model(numels)
        return
    named = [name for name in state.worker if not name.isdecimal()]
    if named:
        raise StateMismatchError(
            f"The saved state names parameters, such as {named[0]!r}, and this state knows none: "
            "use attach(ddp_model, ...), or state.bind(...) before loading."
        )
