"""The topology of one exchange: by the option, by the rule of "auto", or as in a loaded state."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.node_description import describe_ranks
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh, check_node_options
from effadam_hook.exchange.nodes import tabulate
from effadam_hook.exchange.topology import (
    AUTO,
    FLAT_TOPOLOGIES,
    HIERARCHICAL,
    NodeTable,
    Topology,
    choose_topology,
    describe_obstacle,
    make_topology,
)

__all__ = ["TopologyChoice"]

_UNKNOWN = "sharded"
"""The view before the ranks have met, when nothing depends on it."""

_log = logging.getLogger(__name__)


class TopologyChoice:
    """Choose the topology of one exchange, the same on all ranks.

    Args:
        option: The option ``topology``.

    Attributes:
        table: The nodes; None before :meth:`find`, and where a flat topology has not needed to know.
        reason: The reason for the choice of ``topology="auto"``; empty without a choice.
    """

    def __init__(self, option: str) -> None:
        self.table: NodeTable | None = None
        self.reason = ""
        self._option = option
        self._name = "" if option == AUTO else option
        self._problem = ""
        self._view: Topology | None = None
        self._intra_node_group: IntraNodeGroup | None = None
        self._device_mesh: NodeMesh | None = None

    @property
    def is_made(self) -> bool:
        """Return whether the name of the topology is known."""
        return self._name != ""

    def name_nodes(
        self, intra_node_group: IntraNodeGroup | None, device_mesh: NodeMesh | None
    ) -> None:
        """Take the nodes from the user instead of finding them.

        Args:
            intra_node_group: The option of that name.
            device_mesh: The option of that name.

        Raises:
            TypeError: If one has the wrong type.
            ValueError: If both are given, or the topology knows no nodes.
        """
        check_node_options(self._option, intra_node_group, device_mesh)
        self._intra_node_group, self._device_mesh = intra_node_group, device_mesh

    @property
    def node_numbers(self) -> tuple[int, int] | None:
        """Return ``device_mesh`` if it consists of numbers, which copies of a state can keep."""
        mesh = self._device_mesh
        return (mesh[0], mesh[1]) if isinstance(mesh, (tuple, list)) else None

    @property
    def depends_on_groups(self) -> bool:
        """Return whether the user names the nodes by objects, which copies of a state cannot keep."""
        given = self._intra_node_group is not None or self._device_mesh is not None
        return given and self.node_numbers is None

    def find(self, group: dist.ProcessGroup, device: torch.device, undivided: str) -> None:
        """Find the nodes, and choose by them; a collective operation.

        Args:
            group: The process group.
            device: A device whose tensors the group's backend can send.
            undivided: The option that needs a whole bucket on every rank; empty without one.

        Raises:
            EffAdamError: On every rank, if the ranks contradict one another where the nodes must be
                known: by the option "hierarchical", or because the user names them.
        """
        descriptions = describe_ranks(group, device, self._intra_node_group, self._device_mesh)
        try:
            self.table = tabulate(descriptions)
        except EffAdamError as error:
            if self._option == HIERARCHICAL or any(own.is_named for own in descriptions):
                raise
            self._problem = str(error)
        obstacle = "" if self.table is None else describe_obstacle(self.table)
        if self._option == HIERARCHICAL and obstacle:
            raise EffAdamError(
                f'{obstacle} topology="{HIERARCHICAL}" needs two or more nodes with equally many '
                'ranks: use topology="auto", or name the nodes with intra_node_group= or device_mesh=.'
            )
        if not self.is_made:
            choice = choose_topology(self.table, undivided)
            self._name, self.reason = choice.name, choice.reason

    def view(self, group: dist.ProcessGroup) -> Topology:
        """Return this rank's view of the servers.

        Args:
            group: The process group.

        Raises:
            EffAdamError: If the topology needs the nodes and they are not known.
        """
        if self._view is not None:
            return self._view
        if not self.is_made:
            return make_topology(_UNKNOWN, group)
        self._view = make_topology(self._name, group, self.table)
        return self._view

    def name_after(self, saved: str, world_size: int, group: dist.ProcessGroup) -> str:
        """Return the topology in which a saved state continues, before the first bucket.

        ``topology="auto"`` keeps that of the saved state on the same number of ranks, whose training
        continues to the bit. Otherwise the rule decides.

        Args:
            saved: Topology of the saved state; may be empty.
            world_size: Number of ranks of the saved state.
            group: The process group.

        Returns:
            The name; empty if the choice remains as it is.
        """
        if self._option != AUTO or not saved:
            return ""
        return saved if saved in FLAT_TOPOLOGIES and world_size == group.size() else ""

    def follow(self, name: str) -> None:
        """Take the topology of a loaded state.

        Args:
            name: Result of :meth:`name_after`.
        """
        if name and name != self._name:
            self._name, self.reason, self._view = name, "as the saved state", None

    def describe(self) -> str:
        """Describe topology, nodes and route of messages, each with its reason."""
        name = self._option
        if name == AUTO and self.is_made:
            name = f"{self._name}, chosen: {self.reason}"
        nodes = "" if self.table is None else self.table.describe()
        route = "" if self._view is None else self._view.route
        return "; ".join(filter(None, (name, nodes, route)))

    def log(self) -> None:
        """Log the choice of "auto", and nodes on which another choice may be better."""
        table = self.table
        if table is not None and len(table.nodes) == 1:
            _log.info(
                'All %d ranks are on one node (topology "%s"). Compression seldom pays inside one '
                "machine: compare with enabled=False, or use attach(..., auto=True).",
                *(table.ranks_per_node, self._name),
            )
        elif self._option == AUTO and self._problem:
            _log.warning('topology="auto" takes "%s": %s', self._name, self._problem)
        elif self._option == AUTO:
            nodes = "" if table is None else f" ({table.list_nodes()})" * (not table.is_even)
            _log.info('topology="auto" takes "%s": %s%s.', self._name, self.reason, nodes)
        elif self._option == HIERARCHICAL and table is not None and table.ranks_per_node == 1:
            _log.info(
                'Every node has one rank: topology="%s" is topology="sharded" here.', HIERARCHICAL
            )
