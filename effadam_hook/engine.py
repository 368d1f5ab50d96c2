"""From one of DDP's buckets to its exchange: the plan it needs, dense or compressed, counted."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook._version import PAYLOAD_VERSION, __version__
from effadam_hook.accumulation import AccumulationCheck
from effadam_hook.config import Config
from effadam_hook.errors import EffAdamError, UnsupportedBackendError
from effadam_hook.exchange import (
    Exchange,
    Passage,
    Topology,
    Watch,
    agree_on_topology,
    check_backend,
    make_exchange,
    make_topology,
    slowest,
)
from effadam_hook.exchange.agreement import check_agreement
from effadam_hook.exchange.dense import DenseExchange
from effadam_hook.kernels import Kernels, select
from effadam_hook.layout import Slot, cut, plan_bucket
from effadam_hook.modes import GradientMode, Mode
from effadam_hook.parameters import ParameterTable
from effadam_hook.plan import BucketPlan
from effadam_hook.residuals import Residuals
from effadam_hook.stats import Clock, Counters
from effadam_hook.trial import Trial

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
        trial: Finds out whether compression pays; None to compress in any case.
        saved_topology: Where ``topology="auto"`` is still to be chosen: what a loaded state was made
            with, which then decides.
        topology_reason: Why the topology was chosen, if it was.
    """

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
        self.trial: Trial | None = None
        self.saved_topology = ""
        self.topology_reason = ""
        self._group = group
        # The same on all ranks and new in every run; empty before the ranks have compared themselves.
        self._word = ""
        self._compressing = False
        self._topology: Topology | None = None
        self._exchange: Exchange | None = None
        self._dense: DenseExchange | None = None
        self._watch: Watch | None = None
        self._accumulation = AccumulationCheck()
        self._plans: dict[int, tuple[object, list[BucketPlan]]] = {}
        # Buckets that wait for the last one, where the gradient's norm must be known first.
        self._waiting: list[tuple[BucketPlan, Passage]] = []

    @property
    def plans(self) -> list[BucketPlan]:
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
        if self.config.topology == "auto":  # not chosen before the first bucket
            return make_topology(self.saved_topology or "rank0", self.group)
        self._topology = make_topology(self.config.topology, self.group)
        return self._topology

    @property
    def way(self) -> str:
        """Which way messages take, and why, once that is known."""
        return "" if self._topology is None else self._topology.way

    @property
    def has_topology(self) -> bool:
        """Whether it is known who the servers are."""
        return self._topology is not None or self.config.topology != "auto"

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
        description = {
            "effadam_hook": __version__,
            "torch": torch.__version__,
            "payload version": PAYLOAD_VERSION,
            "enabled": self.enabled,
            "mode": self.mode.name,
            "optimizer": self.mode.describe(),
            "auto": self.trial is not None,
            **self.config.to_dict(),
            "parameters": self.parameters.describe(),
        }
        self._word = check_agreement(description, self.group, device)

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
            EffAdamError: If the exchange is broken, or the ranks disagree.
        """
        if index == 0:
            warm = self.counters.steps >= self.config.warmup_steps
            if warm and self.trial is not None and not self.trial.is_over:
                self._continue_trial(self.trial, buffer.device)
            self._compressing = self.enabled and warm
            if self.trial is not None and not self.trial.is_over:
                self._compressing &= self.trial.compresses
            self._waiting.clear()
            self.clock.start(buffer.device)
            self._follow_loss_scale()
            self._accumulation.begin(parameters)
            in_backward = _at_end_of_backward(lambda: None)
            if self._exchange is None and not self._compressing:
                self._start_beside_dense(buffer.device)
            self._check_names()
            self.watch.is_in_backward = in_backward
        # Numbered in every step, so that their order does not depend on when compression starts.
        for tensor in parameters:
            self.parameters.find(tensor)
        if not self._compressing or buffer.is_sparse:
            future = self._run_dense(index, buffer, parameters)
        else:
            future = self._run_compressed(index, buffer, parameters)
        if is_last:
            self._release_waiting()
            self._accumulation.see_last(parameters)
            self._when_backward_ends()
            self.clock.stop_after(future)
            self.counters.steps += 1
        return future

    def _continue_trial(self, trial: Trial, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or the times are those of launching kernels
        trial.begin_step(time.perf_counter())
        if not trial.is_complete:
            return
        trial.decide(*slowest(trial.medians_s(), self.group, device))
        self.enabled = bool(trial.pays)
        if self.group.rank() == 0:
            choice = "compresses" if trial.pays else "averages densely"
            _log.info(
                "effadam_hook %s from step %d on: %s", choice, self.counters.steps, trial.reason
            )

    def _when_backward_ends(self) -> None:
        """Wait for the buckets where errors and Ctrl-C are heard, then see what DDP has written.

        DDP waits and writes in a callback that it queues after the last bucket's hook. What is queued
        here runs before it, and what that queues, after it.
        """
        watch, accumulation, mode = self.watch, self._accumulation, self.mode

        def after_ddp() -> None:
            accumulation.end()
            watch.check()
            mode.notice_end_of_backward()

        def before_ddp() -> None:
            watch.join()
            _at_end_of_backward(after_ddp)

        _at_end_of_backward(before_ddp)

    def _follow_loss_scale(self) -> None:
        """Take the residuals along when the loss is multiplied by something else than before."""
        if self.grad_scaler is None or not self.mode.scales_with_loss:
            return
        scale = float(self.grad_scaler.get_scale())
        if scale == self.loss_scale or not 0 < scale < math.inf:
            return
        for residuals in (self.worker, self.server):
            for _, view in residuals:
                view.mul_(scale / self.loss_scale)
        self.loss_scale = scale

    def close(self) -> None:
        """End the exchange's threads."""
        if self._watch is not None:
            self._watch.close()

    @property
    def watch(self) -> Watch:
        """What knows the buckets under way, made when the first one comes."""
        if self._watch is None:
            self._watch = Watch(self.group, self._word)
            # Threads hold on to the watch and not to the engine, so that both can end.
            weakref.finalize(self, self._watch.close)
        return self._watch

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
            self._dense = DenseExchange(self.group, self.watch)
        also = self.mode.averaged(parameters)
        return self._dense.submit(f"bucket {index}", buffer, also)

    def _run_compressed(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor]
    ) -> Future[Tensor]:
        plans = self._plan(index, buffer, parameters)
        assert self._exchange is not None
        look = self.check_replicas and not self.is_joining()
        future: Future[Tensor] | None = None
        start = 0
        for plan in plans:
            layout = plan.layout
            part = buffer[start : start + layout.numel]
            start += layout.numel
            plan.load(part, look)
            size = part.numel() * part.element_size()
            beside = size if plan.averages_first else 0
            self.counters.count(
                size, layout.uplink.payload_bytes + beside, layout.downlink.payload_bytes + beside
            )
            passage = self.watch.enter(
                plan.label,
                "a compressed exchange" + (" after a dense average" if beside else ""),
                plan.fingerprint,
                "encode",
                buffer,
                self._exchange.new_future(),
            )
            # The parts arrive in order, so that the bucket is complete when its last part is.
            future = passage.future
            if passage.is_over:
                continue
            if self.mode.max_grad_norm is not None:
                self._waiting.append((plan, passage))
            else:
                self._submit(plan, passage)
        assert future is not None
        return future

    def _submit(self, plan: BucketPlan, passage: Passage) -> None:
        assert self._exchange is not None
        try:
            self._exchange.submit(plan, passage)
        except Exception as error:  # which backward then raises, like that of a lane
            self.watch.broke(passage, error)

    def _release_waiting(self) -> None:
        """Bound the gradient's norm over all buckets, now that the last one is here."""
        if not self._waiting:
            return
        assert self.mode.max_grad_norm is not None
        buckets = [plan.bucket for plan, _ in self._waiting]
        norm = torch.stack([bucket.float().norm() for bucket in buckets]).norm()
        factor = (self.mode.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for plan, passage in self._waiting:
            plan.bucket.mul_(factor.to(plan.bucket.dtype))
            self._submit(plan, passage)
        self._waiting.clear()

    def _plan(self, index: int, buffer: Tensor, parameters: Sequence[Tensor]) -> list[BucketPlan]:
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
        self._start(buffer.device)
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
    ) -> BucketPlan:
        slots = self._slots(parameters)
        dtype = self.mode.wire_dtype(buffer.dtype)
        layout = plan_bucket(
            slots,
            uplink=self.config.uplink,
            downlink=self.config.downlink,
            scale_rule=self.config.scale_rule,
            block_size=self.config.block_size,
            servers=self.topology.servers,
            itemsize=dtype.itemsize,
        )
        feedback = self.config.error_feedback
        return BucketPlan(
            f"bucket {index}" + (f", part {number}" if count > 1 else ""),
            layout,
            self._start(buffer.device),
            self.topology,
            self.group.size(),
            dtype,
            buffer.device,
            self.worker if feedback else None,
            self.server if feedback else None,
            self.mode.content(parameters, slots, buffer.dtype),
            parameters,
            looks_often=index == number == 0,
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

    def _start_beside_dense(self, device: torch.device) -> None:
        """Open the exchange with the first bucket, even if that one is dense.

        A rank that opened its groups later than the others could not be told that they do something
        else.
        """
        with contextlib.suppress(UnsupportedBackendError):  # dense steps need no exchange
            self._start(device)

    def _start(self, device: torch.device) -> Kernels:
        """At the first bucket: agree, if that is still to do, and open the exchange."""
        if not self._word:
            self.agree(device)
        if not self.has_topology:
            check_backend(self.group, device)
            name, self.topology_reason = agree_on_topology(
                self.saved_topology,
                self.config.uplink.code_bytes(_PROBED_NUMEL),
                self.group,
                device,
            )
            self._topology = make_topology(name, self.group)
        if self._exchange is None:
            self._exchange = make_exchange(self.topology, self.group, device, self.watch)
        if self.kernels is None:
            self.kernels = select(device)
        return self.kernels


def _at_end_of_backward(action: Callable[[], None]) -> bool:
    """Have something done when backward ends; whether there is a backward, as not under join()."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(action)
    except RuntimeError:
        return False
    return True
