"""State of the hook: options, switches, statistics and the dictionary that is saved."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.config import Config
from effadam_hook.config.options import StateOptions, accepts_options, complete_options
from effadam_hook.ddp.auto_compress import AutoCompress
from effadam_hook.ddp.engine import Engine
from effadam_hook.ddp.summary import describe_briefly, stats_of, summarize
from effadam_hook.errors import EffAdamError, warn_caller
from effadam_hook.exchange.collectives import device_of
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh
from effadam_hook.exchange.topology import AUTO, HIERARCHICAL
from effadam_hook.exchange.waiting import gather_bytes
from effadam_hook.feedback.checkpoint import join_ranks
from effadam_hook.feedback.parameters import is_exchanged
from effadam_hook.modes import Mode
from effadam_hook.session.session import ExchangeSession
from effadam_hook.session.snapshot import capture, restore
from effadam_hook.wire.names import canonical_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EfficientAdamState"]


@accepts_options(StateOptions)
class EfficientAdamState:
    """State of :func:`efficient_adam_hook` for one DDP model.

    All ranks must create it with the same options, which are compared before the first exchange.

    Args:
        process_group: Process group of the DDP model; None for the default group, looked up at first
            use.
        intra_node_group: Process group of the ranks of this node, or a function that returns it and is
            called when the ranks meet; None to find the nodes by the hosts of the ranks. For the
            topologies ``"auto"`` and ``"hierarchical"``.
        device_mesh: Instead of ``intra_node_group``: ``(nodes, ranks of a node)``, where the ranks of
            a node follow one another; or a two-dimensional ``DeviceMesh``, or a function that returns
            it.
        **options: Options of :class:`effadam_hook.config.options.StateOptions`.

    Raises:
        ValueError: If the value of an option is invalid.
        TypeError: If an option is unknown or has the wrong type.

    Examples:
        >>> state = EfficientAdamState(quantizer="lloyd4", topology="sharded")
        >>> ddp_model.register_comm_hook(state, efficient_adam_hook)

    Source:
        Efficient-Adam, arXiv 2205.14473, two-way quantization with two-way error feedback.
    """

    def __init__(
        self,
        *,
        process_group: dist.ProcessGroup | None = None,
        intra_node_group: IntraNodeGroup | None = None,
        device_mesh: NodeMesh | None = None,
        **options: Unpack[StateOptions],
    ) -> None:
        objects = ("process_group", "intra_node_group", "device_mesh")
        complete = complete_options(options, StateOptions, beside=objects)
        self.config = Config.from_options(complete)
        self._engine = self._make_engine(process_group)
        self.session.connection.choice.name_nodes(intra_node_group, device_mesh)
        self._is_copy = self._lacks_group = self._lacks_nodes = False
        self.enabled = complete["enabled"]
        self.wait_timeout_s = complete["wait_timeout_s"]

    def _make_engine(self, group: dist.ProcessGroup | None) -> Engine:
        return Engine(self.config, group)

    @property
    def wait_timeout_s(self) -> float | None:
        """Seconds after which a bucket that waits for other ranks raises an error; None by default.

        A slow rank, which loads data or evaluates, causes no error within the time-out of the
        process group, 30 minutes unless ``init_process_group`` sets another one. A deadlock between
        ranks raises an error within seconds in any case. On NCCL the option bounds only the opening
        of the exchange; later waits end with the group's time-out.
        """
        return self.session.connection.wait_timeout_s

    @wait_timeout_s.setter
    def wait_timeout_s(self, value: float | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(
                f"Invalid wait_timeout_s: {value!r}. Must be a number of seconds or None."
            )
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"Invalid wait_timeout_s: {value!r}. Must be greater than 0, or None.")
        self.session.connection.wait_timeout_s = None if value is None else float(value)

    @property
    def enabled(self) -> bool:
        """Return whether steps are compressed; a new value takes effect with the next backward.

        While compression is off, residuals keep their values; they are sent after it is switched on
        again. Setting the attribute ends the measurement of ``auto`` (see :func:`attach`).
        """
        return self._engine.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"Invalid enabled: {value!r}. Must be True or False.")
        turns_on = value and not self._engine.enabled
        self._engine.enabled = value
        if turns_on:
            self._check_momentum()
        if self._engine.auto_compress is not None and not self._engine.auto_compress.is_over:
            self._engine.auto_compress.break_off()

    @property
    def check_replicas(self) -> bool:
        """Return whether ranks compare weights at each step on Gloo; a difference is an error."""
        return self._engine.check_replicas

    @check_replicas.setter
    def check_replicas(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"Invalid check_replicas: {value!r}. Must be True or False.")
        self._engine.check_replicas = value

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that multiplies the loss, or None. Residuals follow its scale.

        The scale is read once per backward, on its device and without waiting for it.
        """
        return self._engine.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"Invalid grad_scaler: {type(scaler).__name__}. Must be a torch.amp.GradScaler."
            )
        self._engine.grad_scaler = scaler

    @property
    def steps(self) -> int:
        """Number of backward passes with communication."""
        return self.session.counters.steps

    @property
    def session(self) -> ExchangeSession:
        """The exchange behind this state: buckets, residuals and the connection between the ranks.

        For tests and tools; a training program does not need it.
        """
        return self._engine.session

    # Copies

    @property
    def is_copy(self) -> bool:
        """Return whether this is an unused copy of another state.

        DDP holds the state, so that ``copy.deepcopy(ddp_model)``, ``AveragedModel(ddp_model)`` and
        ``torch.save(ddp_model)`` copy it. A copy has the same options and is not registered. It has no
        residuals, counters, optimizer, ``grad_scaler`` or process group. When it is attached or
        registered, it becomes a new state and is no longer a copy.
        """
        return self._is_copy

    def __getstate__(self) -> dict[str, Any]:
        engine = self._engine
        connection = engine.session.connection
        group, choice = connection.given_group, connection.choice
        return {
            "config": self.config.to_dict(),
            "enabled": self.enabled,
            "check_replicas": self.check_replicas,
            "wait_timeout_s": self.wait_timeout_s,
            "auto": engine.auto_compress is not None,
            "device_mesh": choice.node_numbers,
            "lacks_nodes": self._lacks_nodes or choice.depends_on_groups,
            "lacks_group": self._lacks_group
            or (group is not None and not (dist.is_initialized() and group is dist.group.WORLD)),
        }

    def __setstate__(self, options: dict[str, Any]) -> None:
        config = options["config"]
        self.config = Config(**{**config, "exact": tuple(config["exact"])})
        self._engine = self._make_engine(None)
        self.session.connection.choice.name_nodes(None, options.get("device_mesh"))
        self._is_copy, self._lacks_group = True, options["lacks_group"]
        self._lacks_nodes = options.get("lacks_nodes", False)
        self.enabled = options["enabled"]
        self.check_replicas = options["check_replicas"]
        self.wait_timeout_s = options["wait_timeout_s"]
        if options["auto"]:
            self.measure_auto_compress()

    def _begin_use(self, group: dist.ProcessGroup | None) -> None:
        """Turn a copy into a new state, unless it lacks the process group of its original."""
        if self._lacks_nodes:
            raise EffAdamError(
                "This is a copy of a state with intra_node_group or device_mesh, and copies have no "
                "process groups. Use attach(ddp_model, ...) with these options."
            )
        if self._lacks_group and group is None:
            raise EffAdamError(
                "This is a copy of a state with a process group of its own, and copies have none. "
                "Use attach(ddp_model, ...), or pass the group: state.bind(..., group)."
            )
        self._is_copy = self._lacks_group = False

    # Registration

    def bind(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        group: dist.ProcessGroup | None = None,
        *,
        other_names: Iterable[str] = (),
    ) -> None:
        """Take the model's names, and compare options and model between all ranks.

        A collective operation, called by :func:`attach`. A state that is registered without it numbers
        the parameters, and compares ranks at the first backward.

        Parameters that are not trainable are known by name but not compared: DDP does not exchange
        them, and ranks may differ in them.

        Args:
            named_parameters: The wrapped module's ``named_parameters(remove_duplicate=False)``, which
                has all names of tied parameters.
            group: Process group of the DDP model.
            other_names: Further names of the model, which DDP ignores. Rules of ``exact`` may match
                them, without effect.

        Raises:
            EffAdamError: If this state has seen parameters already.
            DisagreementError: On all ranks, if the ranks differ.
            TypeError: If a trainable parameter is complex.
            ValueError: If a name pattern in ``exact`` matches no parameter.
        """
        named = list(named_parameters)
        for name, tensor in named:
            if is_exchanged(tensor) and tensor.is_complex():
                raise TypeError(
                    f"Parameter {name!r} has dtype {tensor.dtype}. Must be a real floating dtype: "
                    "store it as a real tensor with torch.view_as_real."
                )
        session = self.session
        if session.connection.has_agreed:
            raise EffAdamError(
                "Cannot take parameter names: this state has compared the ranks already. Bind a state "
                "once, before load_state_dict() and the first backward."
            )
        self._begin_use(group)
        if group is not None:
            session.connection.use_group(group)
        session.parameters.bind(named)
        self._engine.agree(session.parameters.device())
        # After the comparison, so that all ranks have the same rules and raise the same error.
        others = [alias for name in other_names for alias in (name, canonical_name(name))]
        self.config.check_patterns([*session.parameters.aliases(), *others])
        small = session.parameters.quantized_1d(self.config) if self.config.exact else []
        if small and session.group.rank() == 0:
            warn_caller(
                f"exact={self.config.exact} replaces the default ('1d',) and leaves one-dimensional "
                f"parameters to the quantizer: {len(small)}, such as {small[0]!r}. Write "
                f"exact={('1d', *self.config.exact)} to send biases and norms uncompressed as well.",
            )

    def watch_join(self, is_joining: Callable[[], bool]) -> None:
        """Compare weights between ranks (see :attr:`check_replicas`), except under ``join()``.

        Args:
            is_joining: Returns whether the model is under ``join()``, where ranks that have run out of
                data no longer update their weights.
        """
        self._engine.is_joining = is_joining

    def measure_auto_compress(self) -> None:
        """Compress only if that makes steps faster; called by :func:`attach` with ``auto``.

        The first steps after the warm-up are timed, some dense, some compressed, and all ranks keep the
        faster kind. :meth:`summary` reports the result with its reason.
        """
        self._engine.auto_compress = AutoCompress()

    def use(self, mode: Mode) -> None:
        """Set the content of the exchange; called by :func:`attach` before :meth:`bind`.

        Args:
            mode: The mode.
        """
        self.session.use(mode)
        self._check_momentum()

    def _check_momentum(self) -> None:
        config = self.config
        if self.enabled and config.error_feedback:
            self.session.mode.check_momentum(config.uplink.energy * config.downlink.energy)

    def run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        """Exchange one bucket for the hook; see :meth:`effadam_hook.ddp.engine.Engine.run_bucket`."""
        if self._is_copy:
            self._begin_use(None)
        return self._engine.run_bucket(index, buffer, parameters, is_last)

    def close(self) -> None:
        """End the threads of the exchange. The state remains readable and can be saved."""
        self.session.connection.close()

    # Statistics

    def stats(self) -> dict[str, float]:
        """Return counters and residual norms of this rank. Waits for the device.

        Returns:
            ``steps``; ``dense_bytes``, ``uplink_bytes``, ``downlink_bytes`` (payload bytes, see
            :class:`effadam_hook.wire.counters.Counters`); ``ratio``, dense bytes divided by sent bytes;
            ``worker_residual_norm`` and ``server_residual_norm``, 2-norms over this rank's residuals,
            in units of the unscaled loss; ``quantization_error``, the norm of the worker's residual
            divided by that of the last compressed result, 0 before the first; ``exchange_s``, seconds
            of the last exchange, see :class:`effadam_hook.session.clock.Clock`.
        """
        return stats_of(self._engine)

    def __repr__(self) -> str:
        return describe_briefly(self._engine, self._is_copy)

    def summary(self) -> str:
        """Describe options, choices and traffic in lines of text. Waits for the device."""
        return summarize(self._engine, self._is_copy)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's residuals, moments and counters: tensors and plain values only.

        The moments are those of update mode, where they differ between ranks.

        Returns:
            A dictionary for :meth:`load_state_dict` on the same rank of the same number of ranks; its
            tensors are copies. For another number of ranks see :meth:`full_state_dict`.
        """
        return capture(self.session).to_dict()

    def full_state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks for one checkpoint file; a collective operation.

        Returns:
            On the group's rank 0, a dictionary for :meth:`load_state_dict` on any rank of any number
            of ranks; on other ranks, an empty one.
        """
        group = self.session.group
        with self.session.connection.waiting("full_state_dict()"):
            file = io.BytesIO()
            torch.save(self.state_dict(), file)
            files = gather_bytes(file.getvalue(), group, device_of(group), everywhere=False)
        if not files:
            return {}
        return join_ranks(
            [torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) for data in files]
        )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        A state of all ranks (:meth:`full_state_dict`) fits any number of ranks and any topology. On the
        same number of ranks every rank gets its own state back. Otherwise workers start with the mean
        of the saved workers' residuals and moments, and the saved servers' residuals are divided among
        the new servers.

        In update mode the moments of the saved state replace those that the optimizer has loaded.

        On a state that was registered without :func:`attach` or :meth:`bind`, the first call before the
        first backward is a collective operation, which finds the nodes.

        Args:
            saved: A dictionary of :meth:`state_dict` or :meth:`full_state_dict`.

        Raises:
            StateMismatchError: If it does not fit; the running state is unchanged then.
        """
        if not self.session.connection.has_agreed and self.config.topology in (AUTO, HIERARCHICAL):
            # The nodes decide which part of the state is this rank's, and attach has not found them.
            self._engine.agree(device_of(self.session.group))
        restore(self.session, saved)
