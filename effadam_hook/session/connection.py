"""The connection between the ranks of one exchange: comparison, opening, watchdog, end."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from effadam_hook.config import Config
from effadam_hook.errors import EffAdamError, UnsupportedBackendError
from effadam_hook.exchange.agreement import check_agreement, check_steps
from effadam_hook.exchange.collectives import abandon, wire_device
from effadam_hook.exchange.exchange import Exchange, check_backend, make_exchange
from effadam_hook.exchange.topology import Topology
from effadam_hook.exchange.waiting import phase as waiting_phase
from effadam_hook.exchange.watchdog.watchdog import CONNECTING, Watchdog
from effadam_hook.kernels import Kernels, select
from effadam_hook.session.topology_choice import TopologyChoice
from effadam_hook.wire.node_shares import NodeShare

__all__ = ["Connection"]


class Connection:
    """Connect the ranks of a process group for one exchange.

    Args:
        config: The options, the same on all ranks.
        group: The process group; None is the default group, looked up at first use.

    Attributes:
        exchange: Runs bucket jobs; None before :meth:`open`.
        kernels: The implementation of the arithmetic; None before :meth:`open`.
        device: The device of the buckets; None before :meth:`open`.
        choice: The choice of the topology, and the nodes that it follows from.
        run_id: The same on all ranks and new in every run; empty before :meth:`agree`.
        phase: The current operation, for messages.
        is_closed: Whether the threads have been ended.
    """

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        self.exchange: Exchange | None = None
        self.kernels: Kernels | None = None
        self.device: torch.device | None = None
        self.choice = TopologyChoice(config.topology)
        self.run_id = ""
        self.phase = ""
        self.is_closed = False
        self._group = group
        self._watchdog: Watchdog | None = None
        self._wait_timeout_s: float | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            EffAdamError: If there is none yet.
        """
        if self._group is None:
            if not dist.is_initialized():
                raise EffAdamError(
                    "There is no process group yet. Call torch.distributed.init_process_group "
                    "before the state is used, or pass it a process_group."
                )
            self._group = dist.group.WORLD
            assert self._group is not None
        return self._group

    @property
    def topology(self) -> Topology:
        """This rank's view of the servers."""
        return self.choice.view(self.group)

    def share_of(self, block_size: int, exact: frozenset[str]) -> NodeShare | None:
        """Return this rank's share of its node's bucket; None where every rank encodes whole buckets.

        Args:
            block_size: Number of elements that share a scale.
            exact: Names of the parameters that are sent uncompressed.
        """
        topology = self.topology
        if topology.shares == 1:
            return None
        return NodeShare(topology.share, topology.shares, topology.servers, block_size, exact)

    @property
    def given_group(self) -> dist.ProcessGroup | None:
        """The process group as given; None for the default group before its first use."""
        return self._group

    def use_group(self, group: dist.ProcessGroup) -> None:
        """Set the process group to that of DDP."""
        self._group = group

    def agree(
        self,
        device: torch.device,
        describe: Callable[[], dict[str, Any]],
        name: str,
        undivided: str = "",
    ) -> None:
        """Compare options and model with the other ranks, and find the nodes; a collective operation.

        Args:
            device: The device of the buckets, or another whose tensors the group can send.
            describe: Returns plain values, which must be equal on all ranks.
            name: Name of the model in messages.
            undivided: The option that needs a whole bucket on every rank; empty without one.

        Raises:
            DisagreementError: On every rank, if any two differ.
        """
        device = wire_device(self.group, device)
        description: dict[str, Any] | Exception
        try:
            description = describe()
        except Exception as error:  # the others must not wait for this rank
            description = error
        self.run_id = check_agreement(description, self.group, device)
        if isinstance(description, Exception):
            raise description
        # From here on a rank can report an error to the others, also before its first backward.
        self._watchdog = Watchdog(self.group, self.run_id, name)
        self._watchdog.wait_timeout_s = self._wait_timeout_s
        if device.type == "cpu":
            group = self.group
            self._watchdog.on_failure(lambda: abandon(group))
        # Threads reference the watchdog and not the connection, so that both can end.
        weakref.finalize(self, self._watchdog.close)
        with self.waiting("finding the nodes"):
            self.choice.find(self.group, device, undivided)
        table = self.choice.table
        if table is not None and 1 < len(table.nodes) < self.group.size():
            self._watchdog.name_nodes(table)

    def open(
        self,
        device: torch.device,
        steps: int,
        progress: Any,
        block_size: int,
        compressing: bool,
    ) -> None:
        """Connect the ranks and choose kernels; a collective operation.

        It runs before the first bucket, even if that is dense: a rank that opened its groups later
        than the others could not report that it differs.

        Args:
            device: The device of the buckets.
            steps: Steps made so far.
            progress: Further counts that must be equal on all ranks.
            block_size: Number of elements that share a scale.
            compressing: Whether the next bucket is compressed.

        Raises:
            UnsupportedBackendError: If the next bucket is compressed, and the backend cannot carry
                it.
            EffAdamError: If the ranks are at different steps, or one is gone.
        """
        self.phase = "opening the exchange"
        try:
            check_backend(self.group, device)
        except UnsupportedBackendError:
            if compressing:
                raise
            return  # dense steps need no exchange
        device = torch.empty(0, device=device).device  # with its index
        with self.watchdog.hold("opening the exchange", "comparing steps") as held:
            # Over DDP's own connections, which break at once when a rank has died.
            layout = f"{self.topology.name} with blocks of {block_size}"
            wire = wire_device(self.group, device)
            check_steps(self.run_id, steps, progress, layout, self.group, wire)
            held.phase = CONNECTING
            self.exchange = make_exchange(self.topology, self.group, device, self.watchdog, held)
        if self.group.rank() == 0 and self.group.size() > 1:
            self.choice.log()
        self.phase = "choosing kernels"
        self.kernels, self.device = select(device), device

    @property
    def watchdog(self) -> Watchdog:
        """The list of the buckets in flight, made when the ranks have compared options."""
        if self._watchdog is None:
            raise EffAdamError("The ranks have not compared options yet: attach the state first.")
        return self._watchdog

    @property
    def has_agreed(self) -> bool:
        """Return whether the ranks have compared options."""
        return self._watchdog is not None

    @property
    def is_stopped(self) -> bool:
        """Return whether the exchange has stopped for good."""
        return self._watchdog is not None and self._watchdog.failure is not None

    @property
    def wait_timeout_s(self) -> float | None:
        """Seconds after which a bucket that waits is an error; None for the group's time-out."""
        return self._wait_timeout_s

    @wait_timeout_s.setter
    def wait_timeout_s(self, value: float | None) -> None:
        self._wait_timeout_s = value
        if self._watchdog is not None:
            self._watchdog.wait_timeout_s = value

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Enter a wait for all ranks outside a bucket; every rank must do so.

        Args:
            label: Name in messages, such as that of a method.
        """
        if self._watchdog is not None and self._watchdog.is_going_on():
            return self._watchdog.hold(label, "gathering from all ranks")
        return waiting_phase(self.group.rank(), label)

    def stop(self, label: str, error: BaseException) -> EffAdamError:
        """Stop the exchange because of an error on this rank, and report it to the other ranks.

        Args:
            label: The bucket or operation in which it occurred, such as ``"bucket 3"``.
            error: The error.

        Returns:
            The error to raise here.
        """
        if self._watchdog is not None:
            return self._watchdog.stop(label, self.phase, error)
        if isinstance(error, EffAdamError) and str(error).startswith("Rank "):
            return error  # the message has the rank and the phase
        kind = type(error) if isinstance(error, EffAdamError) else EffAdamError
        rank = self.group.rank() if dist.is_initialized() else 0
        text = str(error) or type(error).__name__
        failure = kind(f"Rank {rank}, {label}, {self.phase}: {text}")
        failure.__cause__ = error
        return failure

    def close(self) -> None:
        """End the threads."""
        self.is_closed = True
        if self._watchdog is not None:
            self._watchdog.close()
