"""The state of the hook: what a user configures, switches, asks and saves."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook._version import STATE_VERSION, __version__
from effadam_hook.config import Config
from effadam_hook.ddp.auto_compress import AutoCompress
from effadam_hook.ddp.engine import Engine
from effadam_hook.errors import EffAdamError, StateMismatchError
from effadam_hook.exchange.collectives import device_of
from effadam_hook.exchange.topology import make_topology
from effadam_hook.exchange.waiting import gather_bytes
from effadam_hook.feedback.checkpoint import (
    check_fits,
    check_model,
    deal_out,
    merge_saved,
    read_saved,
    share_saved,
    topology_of,
)
from effadam_hook.feedback.checksum import with_checksum
from effadam_hook.feedback.parameters import is_exchanged
from effadam_hook.kernels import describe
from effadam_hook.modes import Mode
from effadam_hook.session.session import ExchangeSession
from effadam_hook.session.stats import Counters
from effadam_hook.wire.layout import share_of, turn_of
from effadam_hook.wire.names import canonical_name

__all__ = ["EfficientAdamState"]


class EfficientAdamState:
    """What :func:`efficient_adam_hook` needs to know and to remember.

    One state serves one DDP model. All ranks must create it with the same options; they are compared
    before anything is exchanged.

    Args:
        quantizer: Name of the quantizer of both directions, see
            :data:`effadam_hook.wire.quantizers.QUANTIZERS`.
        worker_quantizer: The uplink's, if it is to differ.
        server_quantizer: The downlink's, if it is to differ.
        block_size: Elements that share a scale, a power of two from 16 to 4096.
        topology: ``"rank0"`` (rank 0 is the server), ``"sharded"`` (every rank is, for its share), or
            ``"auto"``: whichever is faster when the first bucket comes, or that of a state loaded
            before. Results do not depend on it.
        error_feedback: Whether what quantization dropped is added to the next step, on both sides.
        exact: Rules for parameters that travel uncompressed: ``"1d"``, ``"<N"`` (fewer than N
            elements), or shell patterns for names, such as ``"*.norm*"``.
        warmup_steps: Backward passes with a dense all-reduce before compression starts.
        enabled: Whether to compress at all. Can be switched between steps, the same on every rank.
        process_group: DDP's process group; None is the default group, looked up at first use.
        scale_rule: How a block finds its scale, ``"least_squares"`` or ``"absmax"``.
        wait_timeout_s: Seconds after which a bucket that waits for other ranks is an error, which says
            what they do; None waits for the process group's time-out. See :attr:`wait_timeout_s`.

    Raises:
        ValueError: If an option has no such value.
        TypeError: If an option has the wrong type.

    Example:
        >>> state = EfficientAdamState(quantizer="lloyd4", topology="sharded")
        >>> ddp_model.register_comm_hook(state, efficient_adam_hook)

    Source:
        Efficient-Adam, arXiv 2205.14473, two-way quantization with two-way error feedback.
    """

    def __init__(
        self,
        *,
        quantizer: str = "lloyd4",
        worker_quantizer: str | None = None,
        server_quantizer: str | None = None,
        block_size: int = 256,
        topology: str = "rank0",
        error_feedback: bool = True,
        exact: tuple[str, ...] | list[str] = ("1d",),
        warmup_steps: int = 0,
        enabled: bool = True,
        process_group: dist.ProcessGroup | None = None,
        scale_rule: str = "least_squares",
        wait_timeout_s: float | None = None,
    ) -> None:
        self.config = Config(
            worker_quantizer=quantizer if worker_quantizer is None else worker_quantizer,
            server_quantizer=quantizer if server_quantizer is None else server_quantizer,
            scale_rule=scale_rule,
            block_size=block_size,
            topology=topology,
            error_feedback=error_feedback,
            exact=tuple(exact) if isinstance(exact, list) else exact,
            warmup_steps=warmup_steps,
        )
        self._engine = Engine(self.config, process_group)
        self._is_copy = self._lacks_group = False
        self.enabled = enabled
        self.wait_timeout_s = wait_timeout_s

    @property
    def wait_timeout_s(self) -> float | None:
        """Seconds after which a bucket that waits for other ranks is an error; None is the default.

        A rank that is merely slow, because it loads data or evaluates, is no error within the process
        group's time-out, 30 minutes unless ``init_process_group`` was told otherwise. Ranks that are
        known to wait for one another for ever raise in seconds in any case. On NCCL only the opening of
        the exchange is bounded: the group's time-out counts.
        """
        return self._engine.session.connection.wait_timeout_s

    @wait_timeout_s.setter
    def wait_timeout_s(self, value: float | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(
                f"Invalid wait_timeout_s: {value!r}. Must be a number of seconds or None."
            )
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"Invalid wait_timeout_s: {value!r}. Must be greater than 0, or None.")
        self._engine.session.connection.wait_timeout_s = None if value is None else float(value)

    @property
    def enabled(self) -> bool:
        """Whether steps are compressed; takes effect with the next backward.

        What the residuals hold when it is switched off stays there, and is sent when it is switched on.
        Setting it ends a auto_compress (see :func:`attach`).
        """
        return self._engine.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"Invalid enabled: {value!r}. Must be True or False.")
        self._engine.enabled = value
        if self._engine.auto_compress is not None and not self._engine.auto_compress.is_over:
            self._engine.auto_compress.break_off()

    @property
    def check_replicas(self) -> bool:
        """Whether ranks compare a few weights at each step, on the CPU only; drift is an error."""
        return self._engine.check_replicas

    @check_replicas.setter
    def check_replicas(self, value: bool) -> None:
        self._engine.check_replicas = value

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that multiplies the loss, if any: residuals follow its scale.

        Its scale is read once per backward, which waits for the device if it lives on one.
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
        """Backward passes with communication so far."""
        return self._engine.session.counters.steps

    # Copies

    @property
    def is_copy(self) -> bool:
        """Whether this is an unused copy of another state.

        DDP holds the state, so that ``copy.deepcopy(ddp_model)``, ``AveragedModel(ddp_model)`` and
        ``torch.save(ddp_model)`` copy it. A copy has the same options and is registered nowhere: it has
        neither residuals, counters, optimizer, ``grad_scaler`` nor process group. Attached or
        registered anew, it works as a new state, and is no copy any more.
        """
        return self._is_copy

    def __getstate__(self) -> dict[str, Any]:
        engine = self._engine
        group = engine.session.connection.given_group
        return {
            "config": self.config.to_dict(),
            "enabled": self.enabled,
            "check_replicas": self.check_replicas,
            "wait_timeout_s": self.wait_timeout_s,
            "auto": engine.auto_compress is not None,
            "lacks_group": self._lacks_group
            or (group is not None and not (dist.is_initialized() and group is dist.group.WORLD)),
        }

    def __setstate__(self, options: dict[str, Any]) -> None:
        config = options["config"]
        self.config = Config(**{**config, "exact": tuple(config["exact"])})
        self._engine = Engine(self.config, None)
        self._is_copy, self._lacks_group = True, options["lacks_group"]
        self.enabled = options["enabled"]
        self.check_replicas = options["check_replicas"]
        self.wait_timeout_s = options["wait_timeout_s"]
        if options["auto"]:
            self.try_out()

    def _begin_use(self, group: dist.ProcessGroup | None) -> None:
        """End being a copy, unless that leaves a state without the process group that it needs."""
        if self._lacks_group and group is None:
            raise EffAdamError(
                "This is a copy of a state with a process group of its own, and copies have none. "
                "Use attach(ddp_model, ...), or hand the group over: state.bind(..., group)."
            )
        self._is_copy = self._lacks_group = False

    @property
    def session(self) -> ExchangeSession:
        """The exchange behind this state: buckets, residuals and the connection between the ranks.

        For tests and tools; a training program does not need it.
        """
        return self._engine.session

    # Registration

    def bind(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        group: dist.ProcessGroup | None = None,
        *,
        other_names: Iterable[str] = (),
    ) -> None:
        """Take the model's names and compare configuration and model between all ranks.

        A collective operation, done by :func:`attach`. A state that was registered by hand and never
        bound numbers the parameters itself and compares at the first backward.

        Parameters that are not trainable are known by name and not compared: DDP exchanges nothing for
        them, and ranks may differ in them.

        Args:
            named_parameters: The wrapped module's ``named_parameters(remove_duplicate=False)``, which
                has all names of tied parameters.
            group: DDP's process group.
            other_names: Further names that the model has and DDP ignores. Rules of ``exact`` may match
                them, to no effect.

        Raises:
            EffAdamError: If this state has seen parameters already.
            DisagreementError: On every rank, if the ranks differ.
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
        engine = self._engine
        self._begin_use(group)
        if group is not None:
            engine.session.connection.use_group(group)
        engine.session.parameters.bind(named)
        engine.agree(engine.session.parameters.device())
        # After the comparison, so that all ranks have the same rules and raise alike.
        others = [alias for name in other_names for alias in (name, canonical_name(name))]
        self.config.check_patterns([*engine.session.parameters.aliases(), *others])

    def watch_join(self, is_joining: Callable[[], bool]) -> None:
        """Compare weights between ranks, see :attr:`check_replicas`, except under ``join()``.

        Args:
            is_joining: Whether the model is under ``join()``, where ranks that have run out of data
                no longer update theirs.
        """
        self._engine.is_joining = is_joining

    def try_out(self) -> None:
        """Compress only if that makes steps faster; done by :func:`attach` with ``auto``.

        The first steps after the warm-up are timed, some dense, some compressed, and on all ranks the
        faster kind stays. :meth:`summary` says which and why.
        """
        self._engine.auto_compress = AutoCompress()

    def use(self, mode: Mode) -> None:
        """Exchange something else than the gradient; :func:`attach` does it before binding.

        Args:
            mode: What to exchange.
        """
        self._engine.session.mode = mode

    def run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        """Exchange one bucket; the hook's work. See :meth:`effadam_hook.ddp.engine.Engine.run_bucket`."""
        if self._is_copy:
            self._begin_use(None)
        return self._engine.run_bucket(index, buffer, parameters, is_last)

    def close(self) -> None:
        """End the exchange's threads. The state can be asked and saved, but not trained with."""
        self._engine.session.connection.close()

    # Questions

    def stats(self) -> dict[str, float]:
        """Counters and residual norms of this rank. Waits for the device.

        Returns:
            ``steps``; ``dense_bytes``, ``uplink_bytes``, ``downlink_bytes`` (payload bytes, see
            :class:`effadam_hook.session.stats.Counters`); ``ratio``, dense over sent;
            ``worker_residual_norm`` and ``server_residual_norm``, 2-norms over this rank's residuals;
            ``exchange_s``, seconds of the last exchange, see :class:`effadam_hook.session.stats.Clock`.
        """
        engine = self._engine
        return {
            **engine.session.counters.to_dict(),
            "ratio": engine.session.counters.ratio,
            "worker_residual_norm": engine.session.worker.norm(),
            "server_residual_norm": engine.session.server.norm(),
            "exchange_s": engine.clock.seconds,
        }

    def summary(self) -> str:
        """What runs and what has travelled, for people."""
        config, engine, stats = self.config, self._engine, self.stats()
        slots = [slot for plan in engine.session.buckets for slot in plan.layout.slots]
        exact = [slot for slot in slots if slot.exact]
        kernels = "not chosen before the first backward"
        if engine.session.connection.kernels is not None:
            kernels = describe(
                engine.session.connection.kernels, engine.session.parameters.device()
            )
        status = "on" if self.enabled else "off (dense all-reduce)"
        topology = config.topology
        if topology == "auto" and engine.session.connection.has_topology:
            topology = f"{engine.session.topology.name}, chosen: {engine.session.connection.topology_reason}"
        if engine.session.connection.route:
            topology += f"; {engine.session.connection.route}"
        if self.enabled and self.steps < config.warmup_steps:
            status = f"warming up (dense all-reduce until step {config.warmup_steps})"
        if self._is_copy:
            status = "a copy, registered with no model: no residuals, no optimizer"
        lines = [
            f"Efficient-Adam {__version__}: {status}",
            f"  exchanges    {engine.session.mode.name}",
            f"  quantizers   up {config.worker_quantizer}, down {config.server_quantizer}, "
            f"blocks of {config.block_size}, scale {config.scale_rule}",
            f"  feedback     {'both sides' if config.error_feedback else 'none'}",
            f"  topology     {topology}",
            *(
                [f"  auto         {engine.auto_compress.outcome}"]
                if engine.auto_compress is not None
                else []
            ),
            f"  kernels      {kernels}",
            f"  exact        {len(exact)} of {len(slots)} parameters, "
            f"{sum(s.numel for s in exact)} of {sum(s.numel for s in slots)} elements",
            *(f"  bypassed     {name}: {why}" for name, why in engine.session.bypassed.items()),
            f"  steps        {stats['steps']}",
            f"  bytes        dense {stats['dense_bytes']}, up {stats['uplink_bytes']}, "
            f"down {stats['downlink_bytes']}: {stats['ratio']:.2f}x less",
            f"  residuals    worker {stats['worker_residual_norm']:.4g}, "
            f"server {stats['server_residual_norm']:.4g}",
        ]
        return "\n".join(lines)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, moments and counters: tensors and plain values only.

        The moments are those of update mode, where they differ between ranks.

        Returns:
            A dictionary for :meth:`load_state_dict` on the same rank of as many ranks; its tensors
            are copies. For another number of ranks see :meth:`full_state_dict`.
        """
        engine, scale = self._engine, self._engine.session.loss_scale
        group, topology, block_size = (
            engine.session.group,
            engine.session.topology,
            self.config.block_size,
        )
        worker = {name: (view / scale).cpu() for name, view in engine.session.worker}
        server = {name: (view / scale).cpu() for name, view in engine.session.server}
        serves, servers = topology.serves or 0, topology.servers
        start = {
            name: share_of(worker[name].numel(), turn_of(name), block_size, serves, servers)[0]
            for name in server
        }
        moments = {
            name: {key: v.cpu() if isinstance(v, Tensor) else v for key, v in values.items()}
            for name, values in engine.session.mode.save().items()
        }
        return with_checksum(
            {
                "version": STATE_VERSION,
                "package": __version__,
                "config": self.config.to_dict(),
                "rank": group.rank(),
                "world_size": group.size(),
                "topology": topology.name
                if engine.session.connection.has_topology
                else engine.session.connection.loaded_topology,
                "servers": servers,
                "block_size": block_size,
                "counters": engine.session.counters.to_dict(),
                "units": engine.session.mode.units,
                "worker": worker,
                "server": server,
                "server_start": start,
                "moments": moments,
            }
        )

    def full_state_dict(self) -> dict[str, Any]:
        """All ranks' states in one, for one checkpoint file; a collective operation.

        Returns:
            On the group's rank 0 a dictionary for :meth:`load_state_dict` on any rank of any number
            of ranks; elsewhere an empty one.
        """
        group = self._engine.session.group
        with self._engine.session.connection.waiting("full_state_dict()"):
            file = io.BytesIO()
            torch.save(self.state_dict(), file)
            files = gather_bytes(file.getvalue(), group, device_of(group), everywhere=False)
        if not files:
            return {}
        states = [
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) for data in files
        ]
        return {"version": STATE_VERSION, "ranks": states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        A state of all ranks (:meth:`full_state_dict`) fits any number of ranks and either topology:
        where they are the same, every rank gets its own back; otherwise workers start with the mean
        of the saved workers' residuals and moments, and the servers share the saved servers'.

        In update mode the moments come from here, whatever the optimizer has loaded before.

        Args:
            saved: What :meth:`state_dict` or :meth:`full_state_dict` returned.

        Raises:
            StateMismatchError: If it does not fit; nothing has changed then.
        """
        try:
            own = self._own_share(saved)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, StateMismatchError):
                raise
            raise StateMismatchError(
                f"The saved state is damaged: {type(error).__name__}: {error}. Use another checkpoint."
            ) from error
        if not self._engine.session.connection.has_topology:
            self._engine.session.connection.loaded_topology = topology_of(own)
        self._engine.session.mode.load(own["moments"])
        self._engine.session.loss_scale = 1.0
        if self.config.error_feedback:
            device = self._engine.session.parameters.device()
            self._engine.session.worker.load(own["worker"], device)
            self._engine.session.server.load(own["server"], device)
        elif own["worker"]:
            warnings.warn(
                "The saved state has residuals, and error_feedback is off: they are dropped.",
                stacklevel=2,
            )
        self._engine.session.counters = Counters(**own["counters"])

    def _own_share(self, saved: Any) -> Mapping[str, Any]:
        """This rank's part of a saved state, checked, under the model's names."""
        engine, group = self._engine, self._engine.session.group
        rank, world_size, block_size = group.rank(), group.size(), self.config.block_size
        states = read_saved(saved, engine.session.parameters.resolve)
        topology = engine.session.topology
        if not engine.session.connection.has_topology and (name := topology_of(states[0])):
            topology = make_topology(name, group)
        serves, servers = topology.serves, topology.servers
        if "ranks" in saved:
            own = merge_saved(states)
            if len(states) == world_size:
                own = {**states[rank], "server": own["server"]}
            own = share_saved(
                own,
                rank=rank,
                world_size=world_size,
                serves=serves,
                servers=servers,
                block_size=block_size,
            )
        else:
            own = states[0]
            if (own["rank"], own["world_size"]) != (rank, world_size):
                raise StateMismatchError(
                    f"The saved state is that of rank {own['rank']} of {own['world_size']}; this is "
                    f"rank {rank} of {world_size}. Load each rank's own state, or one of all ranks "
                    "from full_state_dict()."
                )
        numels = engine.session.parameters.numels() if engine.session.parameters.bound else {}
        check_model(own, numels)
        named = [name for name in own["worker"] if not name.isdecimal()]
        if named and not engine.session.parameters.bound:
            raise StateMismatchError(
                f"The saved state names parameters, such as {named[0]!r}, and this state knows none: "
                "use attach(ddp_model, ...), or state.bind(...) before loading."
            )
        units = engine.session.mode.units
        if own.get("units", units) != units:
            raise StateMismatchError(
                f"The saved residuals are those of {own['units']}, and this state exchanges {units}. "
                "Load a state of the same mode, or none: residuals then start at zero."
            )
        if "ranks" not in saved:
            own = deal_out(
                own,
                serves=serves,
                servers=servers,
                block_size=block_size,
                sign=engine.session.mode.server_sign,
            )
        check_fits(own, engine.session.worker, engine.session.server)
        return own
