"""The engine: the backward passes of one DDP model, each dense or compressed as a whole.

An error that leaves a hook leaves DDP unusable. An error in a hook is therefore reported to the
other ranks at once, the bucket is completed as it is, and ``backward()`` raises the error after DDP
has written gradients and finished its own bookkeeping::

    hook, first bucket   [1] compare options and connect, if not done; decide: dense or compressed
    hook, each bucket    [2] exchange or average ─► a future that DDP waits for
    end of backward      [3] wait for all buckets, where Ctrl-C is received (before DDP)
                         [4] raise the error; restore unused parameters     (after DDP)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.config import Config
from effadam_hook.ddp.accumulation import AccumulationCheck
from effadam_hook.ddp.auto_compress import AutoCompress
from effadam_hook.ddp.backward import at_end_of_backward
from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import wire_device
from effadam_hook.exchange.streams import new_future
from effadam_hook.exchange.timing import slowest
from effadam_hook.session.card import CardAdvice
from effadam_hook.session.clock import Clock
from effadam_hook.session.node_log import NodeLog
from effadam_hook.session.session import ExchangeSession

__all__ = ["Engine"]

_log = logging.getLogger(__name__)


class Engine:
    """The backward passes of one DDP model, dense or compressed.

    Args:
        config: The options, the same on all ranks.
        group: DDP's process group; None is the default group, looked up at first use.

    Attributes:
        session: The exchange of the model's buckets.
        enabled: Whether to compress; read at the first bucket of a backward.
        check_replicas: Whether to compare weights between the ranks, on Gloo.
        is_joining: Returns whether ranks may have ended their optimizer steps, as in DDP's
            ``join()``.
        grad_scaler: Supplies the current loss scale; None if the loss is not scaled.
        clock: Times the exchanges.
        auto_compress: Decides between dense and compressed steps; None to compress in any case.
    """

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        self.session = ExchangeSession(config, group)
        self.enabled = True
        self.check_replicas = True
        self.is_joining: Callable[[], bool] = lambda: True
        self.grad_scaler: torch.amp.GradScaler | None = None
        self.clock = Clock()
        self.auto_compress: AutoCompress | None = None
        self._in_backward = False
        self._error: EffAdamError | None = None  # raised after DDP has finished its bookkeeping
        self._compressing = False
        self._accumulation = AccumulationCheck()
        self._card_advice = CardAdvice()
        self._node_log = NodeLog()

    def agree(self, device: torch.device) -> None:
        """Compare options, versions and model with the other ranks; a collective operation.

        Args:
            device: Device of the buckets.

        Raises:
            DisagreementError: On every rank, if any two differ.
        """
        auto = self.auto_compress is not None
        self.session.agree(device, {"enabled": self.enabled, "auto": auto})

    def describe_topology(self) -> str:
        """Describe the topology and the nodes, for the summary."""
        return self.session.connection.choice.describe()

    def run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        """Exchange one bucket.

        Args:
            index: Index of the bucket in this backward; 0 is first.
            buffer: ``[numel]``, the local gradients of ``parameters`` one after the other,
                overwritten with the result.
            parameters: The parameters of the bucket.
            is_last: Whether it is the last bucket of this backward.

        Returns:
            A future of ``buffer``.

        Raises:
            EffAdamError: If the exchange has stopped, the ranks disagree, or an error occurs here,
                and no backward runs. Within a backward, ``backward()`` raises it.
        """
        session = self.session
        if index == 0:
            self._error, session.connection.phase = None, "comparing options"
            self._in_backward = at_end_of_backward(self._before_ddp)
            if session.connection.is_closed:
                self._error = EffAdamError(
                    "The state of this model was closed, and gradients would not be averaged. Close it "
                    "after the last backward; to train on, wrap the model in DDP anew and attach it."
                )
                if not self._in_backward:
                    raise self._error
        try:
            if self._error is not None:
                return _completed(buffer)
            if session.connection.is_stopped:
                session.connection.watchdog.is_in_backward = self._in_backward
                return session.refuse(index, buffer)
            return self._run_bucket(index, buffer, parameters, is_last)
        except BaseException as error:
            failure = session.connection.stop(f"bucket {index}", error)
            if not isinstance(error, Exception):
                raise
            if not self._in_backward:
                raise failure from failure.__cause__
            self._error = self._error or failure
        return _completed(buffer)

    def _run_bucket(
        self, index: int, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        session = self.session
        if index == 0:
            self._begin(buffer.device, parameters)  # [1]
        # In dense steps too: the numbers must not depend on the step at which compression starts.
        for tensor in parameters:
            session.parameters.find(tensor)
        session.connection.phase = "preparing the bucket"
        if not self._compressing or buffer.is_sparse:  # [2]
            future = session.average(index, buffer, parameters)
        else:
            is_joining = self.is_joining()
            future = session.exchange(
                index,
                buffer,
                parameters,
                check_weights=self.check_replicas and not is_joining,
                is_joining=is_joining,
                restores_unused=self._in_backward and not is_joining,
            )
        if is_last:
            session.release()
            self._accumulation.see_last(parameters)
            self.clock.stop_after(future)
            session.counters.steps += 1
            if not self._in_backward:
                future = self._then_end_without_backward(future)
        return future

    def _begin(self, device: torch.device, parameters: Sequence[Tensor]) -> None:
        """Prepare a backward, at its first bucket."""
        session = self.session
        if not session.connection.has_agreed:
            self.agree(device)
        session.connection.phase = "preparing"
        session.connection.watchdog.is_in_backward = self._in_backward
        self._compressing = self._decide(device)
        session.begin_step()
        self.clock.start(device)
        self._follow_loss_scale(device)
        self._accumulation.begin(parameters)
        session.open(device, self._compressing)
        self._check_names()
        session.mode.begin_backward(self.is_joining())

    def _decide(self, device: torch.device) -> bool:
        """Return whether the current backward is compressed."""
        is_warm = self.session.counters.steps >= self.session.config.warmup_steps
        auto = self.auto_compress
        if not is_warm or auto is None or auto.is_over:
            return self.enabled and is_warm
        self._continue_auto_compress(auto, device)
        return self.enabled and (auto.is_over or auto.compresses)

    def _continue_auto_compress(self, auto_compress: AutoCompress, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # otherwise the times are those of kernel launches
        auto_compress.begin_step(time.perf_counter())
        if not auto_compress.is_complete:
            return
        session = self.session
        label = "comparing dense and compressed steps"
        with session.connection.watchdog.hold(label, "exchanging times"):
            wire = wire_device(session.group, device)
            times = slowest(auto_compress.medians_s(), session.group, wire)
        auto_compress.decide(*times)
        self.enabled = bool(auto_compress.pays)
        if session.group.rank() == 0:
            choice = "compresses" if auto_compress.pays else "averages densely"
            step, reason = session.counters.steps, auto_compress.reason
            _log.info("effadam_hook %s from step %d on: %s", choice, step, reason)

    def _before_ddp(self) -> None:
        """Wait for all buckets in the training thread, which receives Ctrl-C."""
        if self.session.connection.has_agreed:
            self.session.connection.watchdog.join()  # [3]
        at_end_of_backward(self._after_ddp)

    def _after_ddp(self) -> None:
        """Raise the error of this backward, or evaluate the gradients that DDP has written."""
        session = self.session
        session.connection.phase = "after the exchange"
        raised, self._error = self._error, None
        try:
            self._accumulation.end()
            if raised is not None:
                raise raised  # [4]
            if session.connection.has_agreed:
                session.connection.watchdog.check()
            if self._compressing:
                session.restore_unused()
                self._card_advice.log_once(session)
                self._node_log.log_once(session)
            session.mode.end_backward()
        except Exception as error:
            stopped = error is raised or session.connection.is_stopped
            if isinstance(error, EffAdamError) and stopped:
                raise
            raise session.connection.stop("the end of backward", error) from error

    def _then_end_without_backward(self, last: Future[Tensor]) -> Future[Tensor]:
        """Let the mode end the step of a rank out of data, which runs no backward and no loop."""
        mode = self.session.mode

        def end(done: Future[Tensor]) -> Tensor:
            buffer = done.value()  # raises the error of the exchange
            mode.end_without_backward()
            return buffer

        return last.then(end)

    def _follow_loss_scale(self, device: torch.device) -> None:
        """Rescale the residuals when the loss scale has changed."""
        session = self.session
        if self.grad_scaler is None or not session.mode.scales_with_loss:
            return
        session.loss_scale.follow(self.grad_scaler, device, (session.worker, session.server))

    def _check_names(self) -> None:
        config = self.session.config
        if config.name_patterns and not self.session.parameters.bound:
            raise EffAdamError(
                f"exact={config.exact} needs parameter names, which this state does not "
                "have. Use attach(ddp_model, ...), or call "
                "state.bind(ddp_model.module.named_parameters()) after register_comm_hook."
            )


def _completed(buffer: Tensor) -> Future[Tensor]:
    future = new_future(buffer.device)
    future.set_result(buffer)
    return future
