"""The saved state of a rank: a record, and its dictionary of tensors and plain values.

Residuals differ between ranks, so that every rank saves its own state. Parameters are identified by
their canonical names. :meth:`RankState.from_dict` is the schema of the dictionary: it reads every value
once, by its key and its rule. All other code uses the typed record::

    session ─ capture ─► RankState ─ to_dict ─► dictionary, file
    file, dictionary ─ from_dict ─► RankState ─ merge, deal, reassign ─► RankState ─ restore ─► session

In the hierarchical topology the worker is the node, and the worker residual of a rank covers the
rank's share of each parameter. The dictionary then has two more entries: ``nodes``, the ranks of every
node, and ``worker_start``, the first element of each share.

Records of other ranks and other shares: :mod:`effadam_hook.feedback.reshard`. Sessions:
:mod:`effadam_hook.session.snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from effadam_hook._version import STATE_VERSION, __version__
from effadam_hook.errors import StateMismatchError
from effadam_hook.exchange.topology import AUTO, TOPOLOGIES
from effadam_hook.feedback.checksum import with_checksum
from effadam_hook.feedback.moments import MOMENTS
from effadam_hook.feedback.residuals import Residuals
from effadam_hook.feedback.schema import StateReader, check_version, reject
from effadam_hook.wire.counters import COUNTER_NAMES, Counters

__all__ = ["RankState", "Share", "holds_all_ranks", "join_ranks", "read_states"]

_KEYS = frozenset(
    "version rank world_size servers block_size counters worker server server_start moments".split()
)
_ALL_RANKS = "ranks"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Share:
    """Residual of a server for its share of a parameter.

    Attributes:
        start: First element in the parameter.
        values: ``[numel]``, the residual.
    """

    start: int
    values: Tensor

    @property
    def end(self) -> int:
        """Return the element after the last one."""
        return self.start + self.values.numel()


@dataclass(frozen=True)
class RankState:
    """Saved state of one rank. Tensors are one-dimensional and keyed by parameter name.

    Attributes:
        rank: Rank in the process group.
        world_size: Number of ranks.
        topology: Name of the topology; empty if ``topology="auto"`` had chosen none.
        servers: Number of servers.
        block_size: Number of elements that share a scale.
        counters: Steps and bytes.
        units: Content of the exchange, in whose units the residuals are; empty if unknown (version 1).
        worker: Residuals of the worker: of whole parameters, or of this rank's shares of them.
        server: Residuals of this rank as a server.
        moments: Moments and step counts of update mode.
        config: Options, for information.
        nodes: Ranks of every node, if nodes are the workers; None if ranks are.
        worker_start: First element of the worker residuals in the parameters, if nodes are the workers.
    """

    rank: int
    world_size: int
    topology: str
    servers: int
    block_size: int
    counters: Counters
    units: str
    worker: Mapping[str, Tensor]
    server: Mapping[str, Share]
    moments: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    nodes: tuple[tuple[int, ...], ...] | None = None
    worker_start: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary of tensors and plain values, with its checksum."""
        of_nodes: dict[str, Any] = {}
        if self.nodes is not None:
            of_nodes = {"nodes": [list(ranks) for ranks in self.nodes]}
            of_nodes["worker_start"] = dict(self.worker_start)
        return with_checksum(
            {
                "version": STATE_VERSION,
                "package": __version__,
                "config": dict(self.config),
                "rank": self.rank,
                "world_size": self.world_size,
                "topology": self.topology,
                "servers": self.servers,
                "block_size": self.block_size,
                "counters": self.counters.to_dict(),
                "units": self.units,
                "worker": dict(self.worker),
                "server": {name: share.values for name, share in self.server.items()},
                "server_start": {name: share.start for name, share in self.server.items()},
                "moments": {name: dict(entry) for name, entry in self.moments.items()},
                **of_nodes,
            }
        )

    @classmethod
    def from_dict(cls, saved: Any) -> RankState:
        """Read the dictionary of :meth:`to_dict`, or one that version 0.1.0 of the package wrote.

        Args:
            saved: The dictionary.

        Raises:
            StateMismatchError: If it is not a saved state, is damaged, or has a newer version.
        """
        reader = StateReader(saved, _KEYS)
        rank, world_size = reader.integer("rank"), reader.integer("world_size", least=1)
        servers = reader.integer("servers", least=1)
        if rank >= world_size:
            reader.reject("rank", rank, f"below the world size, {world_size}")
        if servers > world_size:
            reader.reject("servers", servers, f"at most the world size, {world_size}")
        counters = Counters(**reader.integers("counters", COUNTER_NAMES))
        config = reader.table("config") if reader.has("config") else {}
        worker, server = reader.residuals("worker"), reader.residuals("server")
        nodes, worker_start = None, dict.fromkeys(worker, 0)
        if reader.has("nodes"):
            nodes = reader.partition("nodes", world_size)
            worker_start = reader.integers("worker_start", worker)
        start = reader.integers("server_start", server)
        shares = {name: Share(start[name], values) for name, values in server.items()}
        for name, share in shares.items():
            first = worker_start.get(name, 0)
            if name not in worker or not first <= share.start <= share.end <= (
                first + worker[name].numel()
            ):
                reader.reject(f"server_start.{name}", share.start, "a share of a saved parameter")
        if reader.has("topology"):
            topology = reader.text("topology", ("", *TOPOLOGIES))
        else:
            has_run = bool(worker or counters.steps)
            topology = _topology_of_version_1(reader, config, world_size, servers, has_run)
        state = cls(
            rank=rank,
            world_size=world_size,
            topology=topology,
            servers=servers,
            block_size=reader.integer("block_size", least=1),
            counters=counters,
            units=reader.text("units") if reader.has("units") else "",
            worker=worker,
            server=shares,
            moments=reader.moments("moments"),
            config=config,
            nodes=nodes,
            worker_start=worker_start if nodes else {},
        )
        reader.check_damage()
        return state

    def renamed(self, resolve: Callable[[str], str]) -> RankState:
        """Return the state with the names of a model.

        Args:
            resolve: Returns the name in the model of a parameter with a saved name.

        Raises:
            StateMismatchError: If two entries belong to one parameter of the model.
        """
        return replace(
            self,
            worker=_renamed("worker", self.worker, resolve),
            server=_renamed("server", self.server, resolve),
            moments=_renamed("moments", self.moments, resolve),
            worker_start=_renamed("worker_start", self.worker_start, resolve),
        )

    def check_model(self, numels: Mapping[str, int]) -> None:
        """Check that all parameters are those of a model.

        Args:
            numels: Number of elements of the model's parameters by name.

        Raises:
            StateMismatchError: If one is no parameter of the model, or has another size.
        """
        for what, name, start, values in self._vectors():
            if name not in numels and name.isdecimal():
                raise StateMismatchError(
                    "The saved state numbers its parameters, as a state that was registered without "
                    "attach() or bind() does, and this one has their names. Load it into a state that "
                    "is registered in the same way."
                )
            if name not in numels:
                raise StateMismatchError(
                    f"The saved state has a {what} of {name!r}, which is no parameter of this model."
                )
            is_share = start is not None and start + values.numel() <= numels[name]
            if values.numel() != numels[name] and not is_share:
                raise StateMismatchError(
                    f"The saved {what} of {name!r} has {values.numel()} elements, the parameter "
                    f"has {numels[name]}. Load a state of the same model."
                )

    def check_residuals(self, worker: Residuals, server: Residuals) -> None:
        """Check that the residuals can replace those of a running session.

        Args:
            worker: Residuals of the worker.
            server: Residuals of this rank as a server.

        Raises:
            StateMismatchError: If one has another size.
        """
        saved = [("worker", worker, name, values) for name, values in self.worker.items()]
        saved += [("server", server, name, share.values) for name, share in self.server.items()]
        for side, residuals, name, values in saved:
            held = residuals.get(name)
            if held is not None and held.numel() != values.numel():
                raise StateMismatchError(
                    f"The saved {side} residual of {name!r} has {values.numel()} elements, the running "
                    f"one has {held.numel()}. Load a state of the same model."
                )

    def _vectors(self) -> Iterator[tuple[str, str, int | None, Tensor]]:
        """Return kind, name, first element if it is a share, and values of every vector."""
        for name, values in self.worker.items():
            start = None if self.nodes is None else self.worker_start.get(name, 0)
            yield "worker residual", name, start, values
        for name, entry in self.moments.items():
            for key in MOMENTS:
                yield key, name, entry.get("start"), entry[key]


def read_states(saved: Any) -> list[RankState]:
    """Read a saved state of one rank, or of all.

    Args:
        saved: A dictionary of :meth:`RankState.to_dict` or of :func:`join_ranks`.

    Returns:
        The states that it holds, in the order of the ranks.

    Raises:
        StateMismatchError: If it is not a saved state, is damaged, or was written by a newer version.
    """
    if not holds_all_ranks(saved):
        return [RankState.from_dict(saved)]
    check_version(saved.get("version"))
    states = saved[_ALL_RANKS]
    if not isinstance(states, (list, tuple)) or not states:
        reject(_ALL_RANKS, states, "a list of the states of all ranks")
    return [RankState.from_dict(state) for state in states]


def join_ranks(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one dictionary with the saved states of all ranks.

    Args:
        states: The dictionaries of all ranks, in their order.
    """
    return {"version": STATE_VERSION, _ALL_RANKS: list(states)}


def holds_all_ranks(saved: Any) -> bool:
    """Return whether a saved state is one of all ranks."""
    return isinstance(saved, Mapping) and _ALL_RANKS in saved


def _renamed(key: str, table: Mapping[str, _T], resolve: Callable[[str], str]) -> dict[str, _T]:
    renamed: dict[str, _T] = {}
    owners: dict[str, str] = {}
    for name, value in table.items():
        here = resolve(name)
        if here in renamed:
            raise StateMismatchError(
                f"The saved state has a {key} entry of {owners[here]!r} and one of {name!r}, which "
                f"are one parameter of this model, {here!r}. Load a state of the same model."
            )
        renamed[here], owners[here] = value, name
    return renamed


def _topology_of_version_1(
    reader: StateReader, config: Mapping[str, Any], world_size: int, servers: int, has_run: bool
) -> str:
    """Return the topology of a state of version 1, which has only the option."""
    option = config.get("topology")
    if isinstance(option, str) and option in TOPOLOGIES:
        return option
    if option != AUTO:
        reader.reject("config.topology", option, f"one of {', '.join((*TOPOLOGIES, AUTO))}")
    if not has_run:
        return ""
    fitting = [n for n, kind in TOPOLOGIES.items() if kind.servers_among(world_size) == servers]
    if not fitting:
        reader.reject("servers", servers, f"those of a topology of {world_size} ranks")
    return fitting[0]
