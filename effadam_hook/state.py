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
from effadam_hook.engine import Engine
from effadam_hook.errors import StateMismatchError
from effadam_hook.exchange.compat import device_of
from effadam_hook.exchange.waiting import gather_bytes
from effadam_hook.kernels import describe
from effadam_hook.layout import share_of
from effadam_hook.modes import Mode
from effadam_hook.saved import check_fits, check_saved, merge_saved, share_saved
from effadam_hook.stats import Counters
from effadam_hook.trial import Trial

__all__ = ["EfficientAdamState"]


class EfficientAdamState:
    """What :func:`efficient_adam_hook` needs to know and to remember.

    One state serves one DDP model. All ranks must create it with the same options; they are compared
    before anything is exchanged.

    Args:
        quantizer: Name of the quantizer of both directions, see
            :data:`effadam_hook.quantizers.QUANTIZERS`.
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
        return self._engine.wait_timeout_s

    @wait_timeout_s.setter
    def wait_timeout_s(self, value: float | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(
                f"Invalid wait_timeout_s: {value!r}. Must be a number of seconds or None."
            )
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"Invalid wait_timeout_s: {value!r}. Must be greater than 0, or None.")
        self._engine.wait_timeout_s = None if value is None else float(value)

    @property
    def enabled(self) -> bool:
        """Whether steps are compressed; takes effect with the next backward.

        What the residuals hold when it is switched off stays there, and is sent when it is switched on.
        Setting it ends a trial (see :func:`attach`).
        """
        return self._engine.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"Invalid enabled: {value!r}. Must be True or False.")
        self._engine.enabled = value
        if self._engine.trial is not None and not self._engine.trial.is_over:
            self._engine.trial.break_off()

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
        return self._engine.counters.steps

    # Registration

    def bind(
        self, named_parameters: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup | None = None
    ) -> None:
        """Take the model's names and compare configuration and model between all ranks.

        A collective operation, done by :func:`attach`. A state that was registered by hand and never
        bound numbers the parameters itself and compares at the first backward.

        Args:
            named_parameters: The wrapped module's ``named_parameters()``.
            group: DDP's process group.

        Raises:
            EffAdamError: If this state has seen parameters already.
            DisagreementError: On every rank, if the ranks differ.
            TypeError: If a trainable parameter is complex.
        """
        named = list(named_parameters)
        for name, tensor in named:
            if tensor.requires_grad and tensor.is_complex():
                raise TypeError(
                    f"Parameter {name!r} has dtype {tensor.dtype}. Must be a real floating dtype: "
                    "store it as a real tensor with torch.view_as_real."
                )
        if group is not None:
            self._engine.use_group(group)
        self._engine.parameters.bind(named)
        self._engine.agree(self._engine.parameters.device())

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
        self._engine.trial = Trial()

    def use(self, mode: Mode) -> None:
        """Exchange something else than the gradient; :func:`attach` does it before binding.

        Args:
            mode: What to exchange.
        """
        self._engine.mode = mode

    def run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        """Exchange one bucket; the hook's work. See :meth:`effadam_hook.engine.Engine.run_bucket`."""
        return self._engine.run_bucket(index, buffer, parameters, is_last)

    def close(self) -> None:
        """End the exchange's threads. The state can be asked and saved, but not trained with."""
        self._engine.close()

    # Questions

    def stats(self) -> dict[str, float]:
        """Counters and residual norms of this rank. Waits for the device.

        Returns:
            ``steps``; ``dense_bytes``, ``uplink_bytes``, ``downlink_bytes`` (payload bytes, see
            :class:`effadam_hook.stats.Counters`); ``ratio``, dense over sent;
            ``worker_residual_norm`` and ``server_residual_norm``, 2-norms over this rank's residuals;
            ``exchange_s``, seconds of the last exchange, see :class:`effadam_hook.stats.Clock`.
        """
        engine = self._engine
        return {
            **engine.counters.to_dict(),
            "ratio": engine.counters.ratio,
            "worker_residual_norm": engine.worker.norm(),
            "server_residual_norm": engine.server.norm(),
            "exchange_s": engine.clock.seconds,
        }

    def summary(self) -> str:
        """What runs and what has travelled, for people."""
        config, engine, stats = self.config, self._engine, self.stats()
        slots = [slot for plan in engine.plans for slot in plan.layout.slots]
        exact = [slot for slot in slots if slot.exact]
        kernels = "not chosen before the first backward"
        if engine.kernels is not None:
            kernels = describe(engine.kernels, engine.parameters.device())
        status = "on" if self.enabled else "off (dense all-reduce)"
        topology = config.topology
        if topology == "auto" and engine.has_topology:
            topology = f"{engine.topology.name}, chosen: {engine.topology_reason}"
        if engine.way:
            topology += f"; {engine.way}"
        if self.enabled and self.steps < config.warmup_steps:
            status = f"warming up (dense all-reduce until step {config.warmup_steps})"
        lines = [
            f"Efficient-Adam {__version__}: {status}",
            f"  exchanges    {engine.mode.name}",
            f"  quantizers   up {config.worker_quantizer}, down {config.server_quantizer}, "
            f"blocks of {config.block_size}, scale {config.scale_rule}",
            f"  feedback     {'both sides' if config.error_feedback else 'none'}",
            f"  topology     {topology}",
            *([f"  auto         {engine.trial.verdict}"] if engine.trial is not None else []),
            f"  kernels      {kernels}",
            f"  exact        {len(exact)} of {len(slots)} parameters, "
            f"{sum(s.numel for s in exact)} of {sum(s.numel for s in slots)} elements",
            *(f"  bypassed     {name}: {why}" for name, why in engine.bypassed.items()),
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
        group, topology = self._engine.group, self._engine.topology
        order = {name: self._engine.parameters.order_of(name) for name, _ in self._engine.worker}
        start = {
            name: share_of(
                view.numel(),
                order[name],
                self.config.block_size,
                topology.serves or 0,
                topology.servers,
            )[0]
            for name, view in self._engine.worker
        }
        scale = self._engine.loss_scale
        server = {name: view / scale for name, view in self._engine.server}
        return {
            "version": STATE_VERSION,
            "package": __version__,
            "config": self.config.to_dict(),
            "rank": group.rank(),
            "world_size": group.size(),
            "servers": topology.servers,
            "block_size": self.config.block_size,
            "counters": self._engine.counters.to_dict(),
            "units": self._engine.mode.units,
            "order": order,
            "worker": {name: view / scale for name, view in self._engine.worker},
            "server": server,
            "server_start": {name: start[name] for name in server},
            "moments": self._engine.mode.save(),
        }

    def full_state_dict(self) -> dict[str, Any]:
        """All ranks' states in one, for one checkpoint file; a collective operation.

        Returns:
            On the group's rank 0 a dictionary for :meth:`load_state_dict` on any rank of any number
            of ranks; elsewhere an empty one.
        """
        group = self._engine.group
        with self._engine.waiting("full_state_dict()"):
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
        if not self._engine.has_topology:
            servers = _servers_of(saved, self._engine.group.size())
            self._engine.saved_topology = "rank0" if servers == 1 else "sharded"
        self._engine.mode.load(own["moments"])
        self._engine.loss_scale = 1.0
        if self.config.error_feedback:
            self._engine.worker.load(own["worker"])
            self._engine.server.load(own["server"])
        elif own["worker"]:
            warnings.warn(
                "The saved state has residuals, and error_feedback is off: they are dropped.",
                stacklevel=2,
            )
        self._engine.counters = Counters(**own["counters"])

    def _own_share(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """This rank's part of a saved state, checked."""
        group, servers = self._engine.group, self._engine.topology.servers
        if not self._engine.has_topology:
            servers = _servers_of(saved, group.size())
        here = (group.size(), servers, self.config.block_size)
        numels = self._engine.parameters.numels() if self._engine.parameters.bound else {}
        if isinstance(saved, Mapping) and "ranks" in saved:
            if saved["version"] != STATE_VERSION:
                raise StateMismatchError(
                    f"The saved state has version {saved['version']!r}. Must be {STATE_VERSION}."
                )
            merged = merge_saved(saved["ranks"])  # also if not needed: it checks all of them
            own: Mapping[str, Any] = saved["ranks"][group.rank() % len(saved["ranks"])]
            if (own["world_size"], own["servers"], own["block_size"]) != here:
                own = share_saved(
                    merged,
                    rank=group.rank(),
                    world_size=group.size(),
                    servers=servers,
                    block_size=self.config.block_size,
                )
        else:
            own = saved
        check_saved(own, numels)
        named = [name for name in own["worker"] if not name.isdecimal()]
        if named and not self._engine.parameters.bound:
            raise StateMismatchError(
                f"The saved state names parameters, such as {named[0]!r}, and this state knows none: "
                "use attach(ddp_model, ...), or state.bind(...) before loading."
            )
        check_fits(own, self._engine.worker, self._engine.server)
        there = (own["world_size"], own["servers"], own["block_size"])
        if there != here or own["rank"] != group.rank():
            raise StateMismatchError(
                f"The saved state is that of rank {own['rank']} with (ranks, servers, block_size) "
                f"= {there}; this is rank {group.rank()} with {here}. Load each rank's own state, "
                "or one of all ranks from full_state_dict()."
            )
        units = self._engine.mode.units
        if own.get("units", units) != units:
            raise StateMismatchError(
                f"The saved residuals are those of {own['units']}, and this state exchanges {units}. "
                "Load a state of the same mode, or none: residuals then start at zero."
            )
        return own


def _servers_of(saved: Mapping[str, Any], world_size: int) -> int:
    """How many servers the topology that a state was saved with has here."""
    own = saved["ranks"][0] if isinstance(saved, Mapping) and "ranks" in saved else saved
    is_sharded = own["servers"] > 1 or own["config"]["topology"] == "sharded"
    return world_size if is_sharded else 1
