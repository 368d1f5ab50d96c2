"""From one of DDP's buckets to its exchange: the plan it needs, dense or compressed, counted."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook._version import PAYLOAD_VERSION, __version__
from effadam_hook.config import Config
from effadam_hook.ddp.accumulation import AccumulationCheck
from effadam_hook.ddp.auto_compress import AutoCompress
from effadam_hook.errors import EffAdamError, UnsupportedBackendError
from effadam_hook.exchange.agreement import check_agreement, check_steps
from effadam_hook.exchange.auto import agree_on_topology
from effadam_hook.exchange.collectives import abandon
from effadam_hook.exchange.dense import DenseExchange
from effadam_hook.exchange.exchange import Exchange, check_backend, make_exchange
from effadam_hook.exchange.timing import slowest
from effadam_hook.exchange.topology import AUTO, TOPOLOGIES, Topology, make_topology
from effadam_hook.exchange.waiting import phase as waiting_phase
from effadam_hook.exchange.watchdog.inflight import InflightBucket
from effadam_hook.exchange.watchdog.watchdog import CONNECTING, Watchdog
from effadam_hook.feedback.parameters import ParameterTable
from effadam_hook.feedback.residuals import Residuals
from effadam_hook.kernels import Kernels, select
from effadam_hook.modes.all_modes import GradientMode, Mode
from effadam_hook.session.buffers import BucketBuffers
from effadam_hook.session.stats import Clock, Counters
from effadam_hook.wire.layout import Slot, cut, lay_out_bucket

__all__ = ["Engine"]

_PROBED_NUMEL = 1 << 20
"""Elements of the payloads with which topologies are timed."""

_log = logging.getLogger(__name__)


class Engine:
    """What happens to the buckets of one DDP model.

    Args:
        config: What the ranks agree on.
        group: DDP's process group; None is the default group, looked up at first use.

    Attributes:
        enabled: Whether to compress; looked at when a backward's first bucket comes.
        check_replicas: Whether to compare weights with the other ranks', where that costs nothing.
        is_joining: Whether ranks may have stopped making optimizer steps, as in DDP's ``join()``.
        grad_scaler: Tells by what the loss is multiplied.
        loss_scale: In which units the residuals are: multiplied by this.
        mode: What is exchanged.
        parameters: Names and positions.
        worker: The worker's residuals.
        server: The residuals of this rank as a server.
        counters: What has travelled.
        clock: How long it took.
        bypassed: Parameters that cannot be compressed, and why.
        kernels: The implementation in use; None before the first compressed bucket.
        auto_compress: Finds out whether compression pays; None to compress in any case.
        loaded_topology: Where ``topology="auto"`` is still to be chosen: what a loaded state was made
            with, which then decides.
        topology_reason: Why the topology was chosen, if it was.
    """

    _agreed = 0

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        self.config = config
        self.enabled = True
        self.check_replicas = True
        self.is_joining: Callable[[], bool] = lambda: True
        self.grad_scaler: torch.amp.GradScaler | None = None
        self.loss_scale = 1.0
        self.mode: Mode = GradientMode()
        self.parameters = ParameterTable()
        self.worker = Residuals()
        self.server = Residuals()
        self.counters = Counters()
        self.clock = Clock()
        self.bypassed: dict[str, str] = {}
        self.kernels: Kernels | None = None
        self.auto_compress: AutoCompress | None = None
        self.loaded_topology = ""
        self.topology_reason = ""
        self._group = group
        # The same on all ranks and new in every run; empty before the ranks have compared themselves.
        self._run_id = ""
        self._wait_timeout_s: float | None = None
        # What the hook is doing, and what is to be raised when DDP has put its books in order.
        self._phase = ""
        self._in_backward = False
        self._error: EffAdamError | None = None
        self._compressing = False
        self._topology: Topology | None = None
        self._exchange: Exchange | None = None
        self._dense: DenseExchange | None = None
        self._watchdog: Watchdog | None = None
        self._accumulation = AccumulationCheck()
        self._plans: dict[int, tuple[object, list[BucketBuffers]]] = {}
        # Buckets that wait for the last one, where the gradient's norm must be known first.
        self._waiting: list[tuple[BucketBuffers, InflightBucket]] = []

    @property
    def plans(self) -> list[BucketBuffers]:
        """The plans of the buckets seen last, in order; large buckets have several."""
        return [plan for _, plans in self._plans.values() for plan in plans]

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
                    "before the state is used, or hand it a process_group."
                )
            self._group = dist.group.WORLD
            assert self._group is not None
        return self._group

    @property
    def topology(self) -> Topology:
        """This rank's view of the servers."""
        if self._topology is not None:
            return self._topology
        if self.config.topology == AUTO:  # not chosen before the first bucket
            return make_topology(self.loaded_topology or next(iter(TOPOLOGIES)), self.group)
        self._topology = make_topology(self.config.topology, self.group)
        return self._topology

    @property
    def route(self) -> str:
        """Which route messages take, and why, once that is known."""
        return "" if self._topology is None else self._topology.route

    @property
    def has_topology(self) -> bool:
        """Whether it is known who the servers are."""
        return self._topology is not None or self.config.topology != AUTO

    def use_group(self, group: dist.ProcessGroup) -> None:
        """Take DDP's process group."""
        self._group = group

    def agree(self, device: torch.device) -> None:
        """Compare configuration and model with the other ranks; a collective operation.

        Args:
            device: Where the group's backend wants tensors.

        Raises:
            DisagreementError: On every rank, if any two differ.
        """
        description: dict[str, Any] | Exception
        try:
            description = self._describe()
        except Exception as error:  # the others must not wait for this rank
            description = error
        self._run_id = check_agreement(description, self.group, device)
        if isinstance(description, Exception):
            raise description
        # From here on a rank that fails, before its first backward too, can tell the others.
        self._watchdog = Watchdog(self.group, self._run_id, self._name())
        self._watchdog.wait_timeout_s = self._wait_timeout_s
        if device.type == "cpu":
            group = self.group
            self._watchdog.on_failure(lambda: abandon(group))
        # Threads hold on to the watchdog and not to the engine, so that both can end.
        weakref.finalize(self, self._watchdog.close)

    def _describe(self) -> dict[str, Any]:
        return {
            "effadam_hook": __version__,
            "torch": torch.__version__,
            "payload version": PAYLOAD_VERSION,
            "enabled": self.enabled,
            "mode": self.mode.name,
            "optimizer": self.mode.describe(),
            "auto": self.auto_compress is not None,
            **self.config.to_dict(),
            "parameters": self.parameters.describe(),
        }

    def _name(self) -> str:
        """A name for messages; the same on ranks that attach models in the same order."""
        Engine._agreed += 1
        first = self.parameters.first_name()
        return f"model {Engine._agreed}" + (f" (with {first!r})" if first else "")

    @property
    def wait_timeout_s(self) -> float | None:
        """Seconds after which a bucket that waits is an error; None for the group's time-out."""
        return self._wait_timeout_s

    @wait_timeout_s.setter
    def wait_timeout_s(self, value: float | None) -> None:
        self._wait_timeout_s = value
        if self._watchdog is not None:
            self._watchdog.wait_timeout_s = value

    def run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        """Exchange one bucket.

        Args:
            index: The bucket's index in this backward; 0 comes first.
            buffer: ``[numel]``, the local gradients of ``parameters`` one after the other,
                overwritten with the result.
            parameters: The parameters of the bucket.
            is_last: Whether it is this backward's last.

        Returns:
            A future of ``buffer``.

        Raises:
            EffAdamError: If the exchange is broken, the ranks disagree, or anything else goes wrong
                here. Within a backward it is raised when DDP has put its books in order: an error that
                leaves the hook leaves DDP unusable.
        """
        if index == 0:
            self._error, self._phase = None, "comparing options"
            self._in_backward = _at_end_of_backward(self._before_ddp)
        try:
            if self._error is None and not self._is_stopped():
                return self._run_bucket(index, buffer, parameters, is_last)
            return self._refuse(index, buffer)
        except BaseException as error:
            failure = self._stop(f"bucket {index}", error)
            if not isinstance(error, Exception):
                raise
            if not self._in_backward:
                raise failure from failure.__cause__
            self._error = self._error or failure
        return _completed(buffer)

    def _is_stopped(self) -> bool:
        return self._watchdog is not None and self._watchdog.failure is not None

    def _refuse(self, index: int, buffer: Tensor) -> Future[Tensor]:
        """Let a bucket pass as it is: the exchange has stopped, and backward raises why."""
        if self._watchdog is None or self._error is not None:
            return _completed(buffer)
        self._watchdog.is_in_backward = self._in_backward
        new_future = None if self._exchange is None else self._exchange.new_future()
        return self._watchdog.enter(f"bucket {index}", "", "", "", buffer, new_future).future

    def _stop(self, label: str, error: BaseException) -> EffAdamError:
        """The error of a hook, after all other ranks have been told."""
        if self._watchdog is not None:
            return self._watchdog.stop(label, self._phase, error)
        if isinstance(error, EffAdamError) and str(error).startswith("Rank "):
            return error  # says where already
        kind = type(error) if isinstance(error, EffAdamError) else EffAdamError
        rank = self.group.rank() if dist.is_initialized() else 0
        text = str(error) or type(error).__name__
        failure = kind(f"Rank {rank}, {label}, {self._phase}: {text}")
        failure.__cause__ = error
        return failure

    def _run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        if index == 0:
            if self._watchdog is None:
                self.agree(buffer.device)
            self._phase = "preparing"
            self.watchdog.is_in_backward = self._in_backward
            warm = self.counters.steps >= self.config.warmup_steps
            if warm and self.auto_compress is not None and not self.auto_compress.is_over:
                self._continue_auto_compress(self.auto_compress, buffer.device)
            self._compressing = self.enabled and warm
            if self.auto_compress is not None and not self.auto_compress.is_over:
                self._compressing &= self.auto_compress.compresses
            self._waiting.clear()
            self.clock.start(buffer.device)
            self._follow_loss_scale()
            self._accumulation.begin(parameters)
            self._phase = "opening the exchange"
            if self._exchange is None:
                self._open(buffer.device)
            self._check_names()
            self.mode.begin_backward(self.is_joining())
        # Numbered in every step, so that their order does not depend on when compression starts.
        for tensor in parameters:
            self.parameters.find(tensor)
        self._phase = "planning"
        if not self._compressing or buffer.is_sparse:
            future = self._run_dense(index, buffer, parameters)
        else:
            future = self._run_compressed(index, buffer, parameters)
        if is_last:
            self._release_waiting()
            self._accumulation.see_last(parameters)
            self.clock.stop_after(future)
            self.counters.steps += 1
            if not self.watchdog.is_in_backward:
                future = self._then_end_without_backward(future)
        return future

    def _continue_auto_compress(self, auto_compress: AutoCompress, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or the times are those of launching kernels
        auto_compress.begin_step(time.perf_counter())
        if not auto_compress.is_complete:
            return
        with self.watchdog.hold("comparing dense and compressed steps", "exchanging times"):
            times = slowest(auto_compress.medians_s(), self.group, device)
        auto_compress.decide(*times)
        self.enabled = bool(auto_compress.pays)
        if self.group.rank() == 0:
            choice = "compresses" if auto_compress.pays else "averages densely"
            _log.info(
                "effadam_hook %s from step %d on: %s",
                choice,
                self.counters.steps,
                auto_compress.reason,
            )

    def _before_ddp(self) -> None:
        """Wait for the buckets where errors and Ctrl-C are heard.

        DDP waits and writes in a callback that it queues after the last bucket's hook. What the hook of
        the first bucket queues runs before it, and what that queues, after it.
        """
        if self._watchdog is not None:
            self._watchdog.join()
        _at_end_of_backward(self._after_ddp)

    def _after_ddp(self) -> None:
        """Raise what went wrong; then see what DDP has written."""
        self._phase = "after the exchange"
        raised, self._error = self._error, None
        try:
            self._accumulation.end()
            if raised is not None:
                raise raised
            if self._watchdog is not None:
                self._watchdog.check()
            if self._compressing:
                for plan in self.plans:
                    plan.restore_unused()
            self.mode.notice_end_of_backward()
        except Exception as error:
            if isinstance(error, EffAdamError) and (error is raised or self._is_stopped()):
                raise
            raise self._stop("the end of backward", error) from error

    def _then_end_without_backward(self, last: Future[Tensor]) -> Future[Tensor]:
        """Let the mode end the step of a rank out of data, which no backward and no loop will end."""
        mode = self.mode

        def end(done: Future[Tensor]) -> Tensor:
            buffer = done.value()  # raises what the exchange raised
            mode.end_without_backward()
            return buffer

        return last.then(end)

    def _follow_loss_scale(self) -> None:
        """Take the residuals along when the loss is multiplied by something else than before."""
        if self.grad_scaler is None or not self.mode.scales_with_loss:
            return
        scale = float(self.grad_scaler.get_scale())
        if scale == self.loss_scale or not 0 < scale < math.inf:
            return
        for residuals in (self.worker, self.server):
            for _, view in residuals:
                # What overflows saturates, as sums do in the kernels.
                view.mul_(scale / self.loss_scale).nan_to_num_()
        self.loss_scale = scale

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Within it this rank waits for all others outside a backward; every rank must do so.

        Args:
            label: How messages name it, such as a method.
        """
        if self._watchdog is not None and self._watchdog.is_going_on():
            return self._watchdog.hold(label, "gathering from all ranks")
        return waiting_phase(self.group.rank(), label)

    def close(self) -> None:
        """End the exchange's threads."""
        if self._watchdog is not None:
            self._watchdog.close()

    @property
    def watchdog(self) -> Watchdog:
        """The list of the buckets under way, made when the ranks have compared options."""
        if self._watchdog is None:
            raise EffAdamError("The ranks have not compared options yet: attach the state first.")
        return self._watchdog

    def _run_dense(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor]
    ) -> Future[Tensor]:
        numel = buffer.numel()
        if buffer.is_sparse:
            for tensor in parameters:
                self.bypassed[self.parameters.find(tensor).name] = "sparse gradient"
            numel = buffer._values().numel()
        size = numel * buffer.element_size()
        self.counters.count(size, size, size)
        if self._dense is None:
            self._dense = DenseExchange(self.group, self.watchdog)
        also = self.mode.averaged(parameters, buffer)
        return self._dense.submit(f"bucket {index}", buffer, also)

    def _run_compressed(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor]
    ) -> Future[Tensor]:
        plans = self._plan(index, buffer, parameters)
        assert self._exchange is not None
        is_joining = self.is_joining()
        look = self.check_replicas and not is_joining
        in_backward = self._in_backward and not is_joining
        future: Future[Tensor] | None = None
        start = 0
        for plan in plans:
            layout = plan.layout
            part = buffer[start : start + layout.numel]
            start += layout.numel
            self._phase = "loading"
            plan.load(part, look, self.counters.steps, is_joining, in_backward)
            size = part.numel() * part.element_size()
            beside = size if plan.averages_first else 0
            self.counters.count(
                size, layout.uplink.payload_bytes + beside, layout.downlink.payload_bytes + beside
            )
            inflight = self.watchdog.enter(
                plan.label,
                "a compressed exchange" + (" after a dense average" if beside else ""),
                plan.fingerprint,
                "encode",
                buffer,
                self._exchange.new_future(),
            )
            # The parts arrive in order, so that the bucket is complete when its last part is.
            future = inflight.future
            if inflight.is_over:
                continue
            if self.mode.max_grad_norm is not None:
                self._waiting.append((plan, inflight))
            else:
                self._submit(plan, inflight)
        assert future is not None
        return future

    def _submit(self, plan: BucketBuffers, inflight: InflightBucket) -> None:
        assert self._exchange is not None
        try:
            self._exchange.submit(plan, inflight)
        except Exception as error:  # which backward then raises, like that of a lane
            self.watchdog.broke(inflight, error)

    def _release_waiting(self) -> None:
        """Bound the gradient's norm over all buckets, now that the last one is here."""
        if not self._waiting:
            return
        assert self.mode.max_grad_norm is not None
        buckets = [plan.bucket for plan, _ in self._waiting]
        norm = torch.stack([bucket.float().norm() for bucket in buckets]).norm()
        factor = (self.mode.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for plan, inflight in self._waiting:
            plan.bucket.mul_(factor.to(plan.bucket.dtype))
            self._submit(plan, inflight)
        self._waiting.clear()

    def _plan(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor]
    ) -> list[BucketBuffers]:
        """The bucket's plans, one a part; new ones if this index shows other parameters than before."""
        key = (buffer.dtype, buffer.device, self.mode.generation, *map(id, parameters))
        known = self._plans.get(index)
        if known is not None and known[0] == key:
            return known[1]
        numels = [tensor.numel() for tensor in parameters]
        if sum(numels) != buffer.numel():
            raise EffAdamError(
                f"Bucket {index} has {buffer.numel()} elements and its parameters have "
                f"{sum(numels)}. They must be equal; a parameter was resized after DDP was built."
            )
        assert self._exchange is not None
        parts = cut(numels, self._exchange.part_numel)
        plans = [
            self._plan_part(index, number, len(parts), buffer, parameters[part])
            for number, part in enumerate(parts)
        ]
        self._plans[index] = (key, plans)
        return plans

    def _plan_part(
        self, index: int, number: int, count: int, buffer: Tensor, parameters: Sequence[Tensor]
    ) -> BucketBuffers:
        slots = self._slots(parameters)
        dtype = self.mode.wire_dtype(buffer.dtype)
        layout = lay_out_bucket(
            slots,
            uplink=self.config.uplink,
            downlink=self.config.downlink,
            scale_rule=self.config.scale_rule,
            block_size=self.config.block_size,
            servers=self.topology.servers,
            itemsize=dtype.itemsize,
        )
        feedback = self.config.error_feedback
        assert self.kernels is not None
        return BucketBuffers(
            f"bucket {index}" + (f", part {number}" if count > 1 else ""),
            layout,
            self.kernels,
            self.topology,
            self.group.size(),
            dtype,
            buffer.device,
            self.worker if feedback else None,
            self.server if feedback else None,
            self.mode.content(parameters, slots, buffer.dtype),
            parameters,
            check_every_step=index == number == 0,
            run_id=self._run_id,
        )

    def _check_names(self) -> None:
        if self.config.name_patterns and not self.parameters.bound:
            raise EffAdamError(
                f"exact={self.config.exact} asks for parameter names, which this state does not "
                "have. Use attach(ddp_model, ...), or call "
                "state.bind(ddp_model.module.named_parameters()) after register_comm_hook."
            )

    def _slots(self, parameters: Sequence[Tensor]) -> list[Slot]:
        slots: list[Slot] = []
        start = 0
        for tensor in parameters:
            known = self.parameters.find(tensor)
            exact = self.config.is_exact(known.aliases, tensor.ndim, tensor.numel())
            slots.append(Slot(known.name, start, tensor.numel(), exact))
            start += tensor.numel()
        return slots

    def _open(self, device: torch.device) -> None:
        """Open the exchange with the first bucket, even if that one is dense.

        A rank that opened its groups later than the others could not be told that they do something
        else.

        Raises:
            UnsupportedBackendError: If the backend cannot carry compressed buckets, and this one is.
        """
        try:
            check_backend(self.group, device)
        except UnsupportedBackendError:
            if self._compressing:
                raise
            return  # dense steps need no exchange
        with self.watchdog.hold("opening the exchange", "comparing steps") as held:
            # Over DDP's own connections, so that a rank that has died is noticed at once.
            check_steps(self._run_id, self.counters.steps, self.mode.progress(), self.group, device)
            if not self.has_topology:
                held.phase = "measuring topologies"
                name, self.topology_reason = agree_on_topology(
                    self.loaded_topology,
                    self.config.uplink.code_bytes(_PROBED_NUMEL),
                    self.group,
                    device,
                )
                self._topology = make_topology(name, self.group)
            held.phase = CONNECTING
            self._exchange = make_exchange(self.topology, self.group, device, self.watchdog, held)
        self._phase = "choosing kernels"
        self.kernels = select(device)


def _completed(buffer: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future


def _at_end_of_backward(action: Callable[[], None]) -> bool:
    """Have something done when backward ends; whether there is a backward, as not under join()."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(action)
    except RuntimeError:
        return False
    return True
