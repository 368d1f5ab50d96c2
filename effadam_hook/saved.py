"""Saved states: tensors and plain values by parameter name, checked before they are believed.

Residuals are per rank, so each rank saves its own. For a run on another number of ranks the states of
all are merged: every new worker starts with the mean of the old workers' residuals, which is what the
invariants of the algorithm are about, and the servers' shares are put together and dealt out again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effadam_hook._version import STATE_VERSION
from effadam_hook.errors import StateMismatchError
from effadam_hook.layout import share_of
from effadam_hook.moments import MOMENTS, check_moments
from effadam_hook.residuals import Residuals
from effadam_hook.stats import Counters

__all__ = ["check_fits", "check_saved", "merge_saved", "share_saved"]

_KEYS = frozenset(
    "version rank world_size servers block_size counters order worker server server_start "
    "moments".split()
)


def check_saved(saved: Any, numels: Mapping[str, int]) -> None:
    """Check one rank's saved state.

    Args:
        saved: What was loaded.
        numels: The model's parameters and their sizes; empty while the model is not known.

    Raises:
        StateMismatchError: If it is not a saved state, or not one of this model.
    """
    if not isinstance(saved, Mapping) or not saved.keys() >= _KEYS:
        raise StateMismatchError(
            "This is no saved state of EfficientAdamState: it must be the dictionary that "
            f"state_dict() returns, with the keys {', '.join(sorted(_KEYS))}."
        )
    if saved["version"] != STATE_VERSION:
        raise StateMismatchError(
            f"The saved state has version {saved['version']!r}. Must be {STATE_VERSION}: load it "
            "with the package version that wrote it."
        )
    _check_plain_values(saved)
    for side in ("worker", "server"):
        for name, value in saved[side].items():
            _check_vector(f"{side} residual", name, value, numels, whole=side == "worker")
    for name, state in saved["moments"].items():
        for key in MOMENTS:
            _check_vector(key, name, state.get(key), numels, whole=True)
        check_moments(name, state)


def _check_plain_values(saved: Mapping[str, Any]) -> None:
    """Everything but the tensors: what is looked up later must be there, and mean something."""
    numbers = {key: saved[key] for key in ("rank", "world_size", "servers", "block_size")}
    tables = {key: saved[key] for key in ("counters", "order", "server_start")}
    for key, table in tables.items():
        if not isinstance(table, Mapping):
            raise _altered(key, table)
        numbers |= {f"{key}.{name}": value for name, value in table.items()}
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _altered(key, value)
    for key in ("worker", "server", "moments"):
        if not isinstance(saved[key], Mapping):
            raise _altered(key, saved[key])
    for name, moments in saved["moments"].items():
        if not isinstance(moments, Mapping):
            raise _altered(f"moments.{name}", moments)
    if saved["counters"].keys() != Counters().to_dict().keys():
        raise _altered("counters", sorted(saved["counters"]))
    if not saved["order"].keys() >= saved["worker"].keys() | saved["server"].keys():
        raise _altered("order", sorted(saved["order"]))
    if saved["server_start"].keys() != saved["server"].keys():
        raise _altered("server_start", sorted(saved["server_start"]))
    ranks, servers = saved["world_size"], saved["servers"]
    if saved["rank"] >= ranks or not 1 <= servers <= ranks or saved["block_size"] < 1:
        raise _altered("(rank, world_size, servers, block_size)", tuple(numbers.values())[:4])


def _altered(key: str, value: Any) -> StateMismatchError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return StateMismatchError(
        f"The saved state has {key} = {shown}, which state_dict() never writes: it is damaged. Use "
        "another checkpoint."
    )


def check_fits(saved: Mapping[str, Any], worker: Residuals, server: Residuals) -> None:
    """Check a rank's saved state against the residuals that it is to replace.

    Args:
        saved: A state that :func:`check_saved` has passed.
        worker: The worker's residuals.
        server: The residuals of this rank as a server.

    Raises:
        StateMismatchError: If one has another size.
    """
    for side, residuals in (("worker", worker), ("server", server)):
        for name, value in saved[side].items():
            held = residuals.get(name)
            if held is not None and held.numel() != value.numel():
                raise StateMismatchError(
                    f"The saved {side} residual of {name!r} has {value.numel()} elements, the running "
                    f"one has {held.numel()}. Load a state of the same model."
                )


def _check_vector(what: str, name: str, value: Any, numels: Mapping[str, int], whole: bool) -> None:
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
        raise StateMismatchError(
            f"The saved {what} of {name!r} must be a one-dimensional floating tensor."
        )
    if not bool(torch.isfinite(value).all()):
        raise StateMismatchError(
            f"The saved {what} of {name!r} holds a NaN or an infinity; it would poison "
            "every later step. Use an earlier checkpoint."
        )
    if not numels:
        return
    if name not in numels:
        raise StateMismatchError(
            f"The saved state has a {what} of {name!r}, which is no parameter of this model."
        )
    fits = value.numel() == numels[name] if whole else value.numel() <= numels[name]
    if not fits:
        raise StateMismatchError(
            f"The saved {what} of {name!r} has {value.numel()} elements, the parameter "
            f"has {numels[name]}. Load a state of the same model."
        )


def merge_saved(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn the states of all ranks into one that any number of ranks can start from.

    Args:
        states: Every rank's saved state, in the order of the ranks.

    Returns:
        A state of a single rank and server: the workers' mean residuals and the whole parameters'
        server residuals.

    Raises:
        StateMismatchError: If the states are not those of all ranks of one run.
    """
    if not isinstance(states, Sequence) or not states:
        raise _altered("ranks", states)
    for rank, state in enumerate(states):
        check_saved(state, {})
        if state["rank"] != rank or state["world_size"] != len(states):
            raise StateMismatchError(
                f"State {rank} of {len(states)} is that of rank {state['rank']} of "
                f"{state['world_size']}. Must be the states of all ranks, in order."
            )
    worker: dict[str, Tensor] = {}
    server: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for state in states for name in state["worker"]):
        worker[name] = _mean([s["worker"][name] for s in states if name in s["worker"]], states)
    moments = {
        name: {
            **state,
            **{key: _mean([s["moments"][name][key] for s in states], states) for key in MOMENTS},
        }
        for name, state in states[0]["moments"].items()
    }
    for name in dict.fromkeys(name for state in states for name in state["server"]):
        shares = [
            (state["server_start"][name], state["server"][name])
            for state in states
            if name in state["server"]
        ]
        shares.sort(key=lambda share: share[0])
        ends = itertools.accumulate(share.numel() for _, share in shares)
        whole = torch.cat([share for _, share in shares])
        if [start for start, _ in shares[1:]] != list(ends)[:-1] or len(whole) != len(worker[name]):
            raise _altered(f"server_start.{name}", [start for start, _ in shares])
        server[name] = whole
    return {
        **states[0],
        "rank": 0,
        "world_size": 1,
        "servers": 1,
        "worker": worker,
        "server": server,
        "server_start": dict.fromkeys(server, 0),
        "moments": moments,
    }


def _mean(held: Sequence[Tensor], states: Sequence[object]) -> Tensor:
    """The mean over all ranks; a rank that holds none counts as zero."""
    return (torch.stack(list(held)).double().sum(dim=0) / len(states)).to(held[0].dtype)


def share_saved(
    merged: Mapping[str, Any], *, rank: int, world_size: int, servers: int, block_size: int
) -> dict[str, Any]:
    """Deal a merged state out to one rank of a new run.

    Args:
        merged: What :func:`merge_saved` returned.
        rank: The rank in the new run.
        world_size: How many ranks the new run has.
        servers: How many of them are servers.
        block_size: The new run's block size.

    Returns:
        That rank's state.
    """
    server: dict[str, Tensor] = {}
    start: dict[str, int] = {}
    if rank < servers:
        for name, whole in merged["server"].items():
            order = merged["order"][name]
            first, numel = share_of(whole.numel(), order, block_size, rank, servers)
            if numel:
                server[name] = whole[first : first + numel]
                start[name] = first
    return {
        **merged,
        "rank": rank,
        "world_size": world_size,
        "servers": servers,
        "block_size": block_size,
        "server": server,
        "server_start": start,
    }
