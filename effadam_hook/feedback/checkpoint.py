"""Saved states: tensors and plain values by parameter name, checked before they are believed.

Residuals are per rank, so each rank saves its own. For a run on another number of ranks the states of
all are merged: every new worker starts with the mean of the old workers' residuals, which is what the
invariants of the algorithm are about, and the servers' shares are put together and dealt out again.

A parameter's identity is its canonical name. Which elements a state's server residuals cover is saved
with them. Where that is not what the rank serves now, as in a state of version 1, whose shares depend
on the order of the parameters, shares are dealt out anew:

- from a state of all ranks, exactly;
- from a rank's own state, whose other ranks' parts are not at hand, what this rank no longer serves
  moves into its worker residual. The conserved total is ẽ + (1/N) Σ e_i, so it moves N times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effadam_hook._version import STATE_VERSION, __version__
from effadam_hook.errors import StateMismatchError
from effadam_hook.exchange.topology import AUTO, TOPOLOGIES
from effadam_hook.feedback.checksum import CHECKSUM_KEY, checksum_of
from effadam_hook.feedback.moments import MOMENTS, check_moments
from effadam_hook.feedback.residuals import Residuals
from effadam_hook.wire.layout import share_of, turn_of

__all__ = [
    "check_fits",
    "check_model",
    "check_saved",
    "deal_out",
    "merge_saved",
    "read_saved",
    "share_saved",
    "topology_of",
]

_KEYS = frozenset(
    "version rank world_size servers block_size counters worker server server_start moments".split()
)
_COUNTERS = frozenset("steps dense_bytes uplink_bytes downlink_bytes".split())
_NAMED = ("worker", "server", "server_start", "moments")


def read_saved(saved: Any, resolve: Callable[[str], str]) -> list[dict[str, Any]]:
    """Check a saved state of one rank or of all, and translate its names into the model's.

    Args:
        saved: What was loaded.
        resolve: Translates a saved name into the name of the same parameter here.

    Returns:
        The states of all ranks that it holds, without their checksums.

    Raises:
        StateMismatchError: If it is not a saved state, is damaged, or was written by a newer version.
    """
    if isinstance(saved, Mapping) and "ranks" in saved:
        _check_version(saved["version"])
        states = saved["ranks"]
        if not isinstance(states, (list, tuple)) or not states:
            raise _altered("ranks", states)
    else:
        states = [saved]
    for state in states:
        check_saved(state)
    return [_renamed(state, resolve) for state in states]


def _renamed(saved: Mapping[str, Any], resolve: Callable[[str], str]) -> dict[str, Any]:
    renamed = {key: value for key, value in saved.items() if key != CHECKSUM_KEY}
    for key in _NAMED:
        table: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for name, value in saved[key].items():
            here = resolve(name)
            if here in table:
                raise StateMismatchError(
                    f"The saved state has a {key} entry of {owners[here]!r} and one of {name!r}, which "
                    f"are one parameter of this model, {here!r}. Load a state of the same model."
                )
            table[here], owners[here] = value, name
        renamed[key] = table
    return renamed


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _altered("version", version)
    if version > STATE_VERSION:
        raise StateMismatchError(
            f"The saved state has version {version}. Must be at most {STATE_VERSION}, which is what "
            f"effadam-hook {__version__} reads: install the version of the package that wrote it, or "
            "a newer one, or begin without a state."
        )


def check_saved(saved: Any) -> None:
    """Check one rank's saved state, whatever the model.

    Args:
        saved: What was loaded.

    Raises:
        StateMismatchError: If it is not a saved state, is damaged, or was written by a newer version.
    """
    if isinstance(saved, Mapping) and "version" in saved:
        _check_version(saved["version"])
    if not isinstance(saved, Mapping) or not saved.keys() >= _KEYS:
        raise StateMismatchError(
            "This is no saved state of EfficientAdamState: it must be the dictionary that "
            f"state_dict() returns, with the keys {', '.join(sorted(_KEYS))}."
        )
    held, own = saved.get(CHECKSUM_KEY), None
    if saved["version"] > 1 or CHECKSUM_KEY in saved:  # version 1 had none
        own = checksum_of(saved)
    damage = (
        ""
        if held == own
        else "The saved state is damaged: its contents, in value and dtype, are not those that "
        f"state_dict() returned. Its checksum is {held!r}, theirs is {own}. Use another checkpoint."
    )
    try:
        _check_values(saved)
    except StateMismatchError as error:
        raise StateMismatchError(f"{error} {damage}" if damage else str(error)) from error
    if damage:
        raise StateMismatchError(damage)


def _check_values(saved: Mapping[str, Any]) -> None:
    """Check every value by itself, so that a message can name the one that is wrong."""
    _check_plain_values(saved)
    for side in ("worker", "server"):
        for name, value in saved[side].items():
            _check_vector(f"{side} residual", name, value)
    for name, state in saved["moments"].items():
        for key in MOMENTS:
            _check_vector(key, name, state.get(key))
        check_moments(name, state)
    for name, share in saved["server"].items():
        end = saved["server_start"][name] + share.numel()
        if name not in saved["worker"] or end > saved["worker"][name].numel():
            raise _altered(f"server_start.{name}", saved["server_start"][name])


def check_model(saved: Mapping[str, Any], numels: Mapping[str, int]) -> None:
    """Check a state's parameters against the model's.

    Args:
        saved: A state that :func:`read_saved` has passed.
        numels: The model's parameters and their sizes; empty while the model is not known.

    Raises:
        StateMismatchError: If one is no parameter of the model, or has another size.
    """
    if not numels:
        return
    vectors = [("worker residual", name, value) for name, value in saved["worker"].items()]
    for name, state in saved["moments"].items():
        vectors += [(key, name, state[key]) for key in MOMENTS]
    for what, name, value in vectors:
        if name not in numels:
            raise StateMismatchError(
                f"The saved state has a {what} of {name!r}, which is no parameter of this model."
            )
        if value.numel() != numels[name]:
            raise StateMismatchError(
                f"The saved {what} of {name!r} has {value.numel()} elements, the parameter "
                f"has {numels[name]}. Load a state of the same model."
            )


def _check_plain_values(saved: Mapping[str, Any]) -> None:
    """Everything but the tensors: what is looked up later must be there, and mean something."""
    numbers = {key: saved[key] for key in ("rank", "world_size", "servers", "block_size")}
    tables = {key: saved[key] for key in ("counters", "server_start")}
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
    if saved.get("topology", "") not in ("", *TOPOLOGIES):
        raise _altered("topology", saved["topology"])
    if saved["counters"].keys() != _COUNTERS:
        raise _altered("counters", sorted(saved["counters"]))
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


def _check_vector(what: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
        raise StateMismatchError(
            f"The saved {what} of {name!r} must be a one-dimensional floating tensor."
        )
    if not bool(torch.isfinite(value).all()):
        raise StateMismatchError(
            f"The saved {what} of {name!r} holds a NaN or an infinity; it would poison "
            "every later step. Use an earlier checkpoint."
        )


def topology_of(saved: Mapping[str, Any]) -> str:
    """The topology that a state was saved with.

    Args:
        saved: A state that :func:`read_saved` has passed.

    Returns:
        Its name, or an empty text if ``topology="auto"`` had not chosen yet.
    """
    if "topology" in saved:
        return str(saved["topology"])
    config = saved["config"]["topology"]  # version 1
    if config == AUTO and not saved["worker"] and not saved["counters"]["steps"]:
        return ""
    if config in TOPOLOGIES:
        return str(config)
    ranks, servers = saved["world_size"], saved["servers"]
    return next(n for n, kind in TOPOLOGIES.items() if kind.servers_among(ranks) == servers)


def merge_saved(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn the states of all ranks into one that any number of ranks can start from.

    Args:
        states: Every rank's saved state, in the order of the ranks, as :func:`read_saved` returns
            them.

    Returns:
        A state of a single rank and server: the workers' mean residuals and the whole parameters'
        server residuals.

    Raises:
        StateMismatchError: If the states are not those of all ranks of one run.
    """
    for rank, state in enumerate(states):
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
        starts = [start for start, _ in shares]
        if starts != [0, *ends][:-1] or len(whole) != len(worker[name]):
            raise _altered(f"server_start.{name}", starts)
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
    merged: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    serves: int | None,
    servers: int,
    block_size: int,
) -> dict[str, Any]:
    """Deal the server residuals of a merged state out to one rank of a run.

    Args:
        merged: A state with the whole parameters' server residuals, as :func:`merge_saved` returns it.
        rank: The rank in the run.
        world_size: How many ranks the run has.
        serves: Which server the rank is, if any.
        servers: How many servers there are.
        block_size: The run's block size.

    Returns:
        That rank's state.
    """
    server: dict[str, Tensor] = {}
    start: dict[str, int] = {}
    for name, whole in merged["server"].items():
        first, numel = _share(name, whole.numel(), block_size, serves, servers)
        if numel:
            server[name], start[name] = whole[first : first + numel], first
    return {
        **merged,
        "rank": rank,
        "world_size": world_size,
        "servers": servers,
        "block_size": block_size,
        "server": server,
        "server_start": start,
    }


def deal_out(
    own: Mapping[str, Any], *, serves: int | None, servers: int, block_size: int, sign: int
) -> dict[str, Any]:
    """Fit a rank's own state to the elements that the rank serves now, losing nothing.

    Args:
        own: The state, as :func:`read_saved` returns it.
        serves: Which server the rank is now, if any.
        servers: How many servers there are now.
        block_size: The run's block size.
        sign: 1 if a server's residual adds to a worker's, -1 if it subtracts.

    Returns:
        The state with this rank's present shares. What it held of others is in its worker residual.
    """
    worker = dict(own["worker"])
    server: dict[str, Tensor] = {}
    start: dict[str, int] = {}
    for name, residual in own["worker"].items():
        first, numel = _share(name, residual.numel(), block_size, serves, servers)
        held, at = own["server"].get(name), own["server_start"].get(name, first)
        if held is not None and (at, held.numel()) == (first, numel):
            server[name], start[name] = held, first
            continue
        whole = torch.zeros_like(residual)
        if held is not None:
            whole[at : at + held.numel()] = held
        if numel:
            server[name], start[name] = whole[first : first + numel].clone(), first
        if held is not None:
            whole[first : first + numel] = 0
            worker[name] = residual + whole * (sign * own["world_size"])
    return {
        **own,
        "servers": servers,
        "block_size": block_size,
        "worker": worker,
        "server": server,
        "server_start": start,
    }


def _share(
    name: str, numel: int, block_size: int, serves: int | None, servers: int
) -> tuple[int, int]:
    """First element and number of elements that a rank serves of a parameter."""
    if serves is None:
        return 0, 0
    return share_of(numel, turn_of(name), block_size, serves, servers)
