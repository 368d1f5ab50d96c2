"""The exchange of one model between the ranks of a process group, without DDP.

The caller passes *buckets*: a flat tensor, and the tensors whose elements it holds, one after the
other. All ranks make the same calls in the same order::

    session = ExchangeSession(Config(worker_quantizer="lloyd4", server_quantizer="lloyd4"), group)
    session.parameters.bind(named_parameters)    # optional: names for the tensors
    session.agree(device)                        # [1] all ranks compare options, versions and names
    session.open(device)                         # [2] connections, topology, kernels
    future = session.exchange(0, flat, tensors)  # [3] quantized both ways, with error feedback
    future = session.average(1, flat, tensors)   # [3] or dense

DDP (:mod:`effadam_hook.ddp`) is one caller; :func:`exchange_all` is the shortest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook._version import PAYLOAD_VERSION, __version__
from effadam_hook.config import Config
from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.dense import DenseExchange
from effadam_hook.exchange.node_bound import NodeBound
from effadam_hook.exchange.streams import new_future
from effadam_hook.exchange.topology import HIERARCHICAL, Topology
from effadam_hook.exchange.watchdog.inflight import InflightBucket
from effadam_hook.feedback.parameters import ParameterTable
from effadam_hook.feedback.residuals import Residuals
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.modes import GradientMode, Mode
from effadam_hook.session.block_size import BlockSize
from effadam_hook.session.buckets import Buckets
from effadam_hook.session.buffers import BucketBuffers
from effadam_hook.session.connection import Connection
from effadam_hook.session.loss_scale import LossScale
from effadam_hook.wire.counters import Counters

__all__ = ["ExchangeSession", "exchange_all"]


class ExchangeSession:
    """Exchange the buckets of one model.

    Args:
        config: The options, the same on all ranks.
        group: The process group; None is the default group, looked up at first use.

    Attributes:
        config: The options.
        mode: The content of the exchange: gradients, preconditioned gradients or updates.
        parameters: Names of the tensors.
        worker: The worker's residuals.
        server: The residuals of this rank as a server.
        loss_scale: The factor by which residuals are multiplied, as the loss is.
        counters: Bytes exchanged so far.
        bypassed: Parameters that cannot be compressed, with the reason.
        blocks: The block size.
        connection: The connection to the other ranks: group, topology, kernels, watchdog.
    """

    _named: ClassVar[int] = 0

    def __init__(self, config: Config, group: dist.ProcessGroup | None = None) -> None:
        self.config = config
        self.mode: Mode = GradientMode()
        self.parameters = ParameterTable()
        self.worker = Residuals()
        self.server = Residuals()
        self.loss_scale = LossScale()
        self.counters = Counters()
        self.bypassed: dict[str, str] = {}
        self.blocks = BlockSize(config, self.parameters)
        self.connection = Connection(config, group)
        self._dense: DenseExchange | None = None
        self._buckets = Buckets()
        # Buckets that wait for the last one, where the gradient's norm must be known first.
        self._waiting: list[tuple[BucketBuffers, InflightBucket]] = []

    @property
    def group(self) -> dist.ProcessGroup:
        """Return the process group."""
        return self.connection.group

    @property
    def topology(self) -> Topology:
        """Return this rank's view of the servers."""
        return self.connection.topology

    def use(self, mode: Mode) -> None:
        """Exchange something else than the gradient.

        Args:
            mode: The content of the exchange.

        Raises:
            ValueError: If the topology does not support it.
        """
        if self.config.topology == HIERARCHICAL and mode.undivided:
            raise ValueError(
                f"Invalid topology: {HIERARCHICAL!r} with {mode.undivided}, which needs whole buckets "
                'on every rank. Must be topology="sharded", "rank0", or "auto", which takes "sharded".'
            )
        self.mode = mode

    def agree(self, device: torch.device, further: Mapping[str, Any] | None = None) -> None:
        """Compare options, versions and model with the other ranks; a collective operation.

        Args:
            device: A device whose tensors the group's backend can send.
            further: Further plain values that must be equal on all ranks.

        Raises:
            DisagreementError: On every rank, if any two differ.
        """
        ExchangeSession._named += 1
        first = self.parameters.first_name()
        name = f"model {ExchangeSession._named}" + (f" (with {first!r})" if first else "")
        undivided = self.mode.undivided
        self.connection.agree(device, lambda: self._describe(further or {}), name, undivided)

    def _describe(self, further: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "effadam_hook": __version__,
            "torch": torch.__version__,
            "payload version": PAYLOAD_VERSION,
            "mode": self.mode.name,
            "optimizer": self.mode.describe(),
            **further,
            **self.config.to_dict(),
            "parameters": self.parameters.describe(),
        }

    def open(self, device: torch.device, compressing: bool = True) -> None:
        """Connect the ranks, choose topology and kernels; a collective operation, done once.

        Args:
            device: The device of the buckets.
            compressing: Whether the next bucket is compressed.

        Raises:
            UnsupportedBackendError: If the next bucket is compressed, and the backend cannot carry
                it.
            EffAdamError: If the ranks are at different steps, or one is gone.
        """
        if self.connection.exchange is None:
            size = self.blocks.value
            exact = self.parameters.exact(self.config)
            self.mode.divide(self.connection.share_of(size, exact))
            uplink, downlink = self.config.uplink, self.config.downlink
            self.mode.connect(len(self.topology.worker_ranks), uplink.energy * downlink.energy)
            steps, progress = self.counters.steps, self.mode.progress()
            self.connection.open(device, steps, progress, size, compressing)

    @property
    def buckets(self) -> list[BucketBuffers]:
        """The buffers of the current buckets, in order; a large bucket has several."""
        return self._buckets.all()

    def exchange(
        self,
        index: int,
        flat: Tensor,
        tensors: Sequence[Tensor],
        *,
        check_weights: bool = False,
        is_joining: bool = False,
        restores_unused: bool = False,
    ) -> Future[Tensor]:
        """Exchange a bucket, quantized both ways, with error feedback on both sides.

        Args:
            index: Index of the bucket in the step; equal tensors under an equal index reuse their
                buffers.
            flat: ``[numel]``, the elements of ``tensors`` one after the other, overwritten with the
                result.
            tensors: The owners of the elements.
            check_weights: Whether to compare one weight between the ranks, on Gloo.
            is_joining: Whether some ranks may make no optimizer steps, which are not compared then.
            restores_unused: Whether :meth:`restore_unused` is called after the step.

        Returns:
            A future of ``flat``.

        Raises:
            EffAdamError: If the session is not open, or the bucket does not fit its tensors.
        """
        connection = self.connection
        exchange, kernels = connection.exchange, connection.kernels
        if exchange is None or kernels is None:
            raise EffAdamError("The session is not open: call open() on all ranks first.")
        if flat.device != connection.device:
            raise EffAdamError(
                f"Bucket {index} is on {flat.device}, and the first one was on {connection.device}. "
                "All parameters of a model must be on one device of the process: give each device a "
                "process, or set state.enabled = False, which averages densely."
            )
        self.connection.phase = "laying out the bucket"
        parts = self._buckets.of(
            *(index, flat, tensors, self, exchange.part_numel),
            *(kernels, exchange.staging, connection.run_id),
        )
        future: Future[Tensor] | None = None
        start = 0
        for buffers in parts:
            layout = buffers.layout
            part = flat[start : start + layout.numel]
            start += layout.numel
            self.connection.phase = "loading"
            buffers.load(part, check_weights, self.counters.steps, is_joining, restores_unused)
            size = part.numel() * part.element_size()
            beside = size if buffers.averages_first else 0
            self.counters.count(
                size, layout.uplink.payload_bytes + beside, layout.downlink.payload_bytes + beside
            )
            inflight = self.connection.watchdog.enter(
                buffers.label,
                "a compressed exchange" + (" after a dense average" if beside else ""),
                buffers.fingerprint,
                "encode",
                flat,
                new_future(flat.device),
            )
            # The parts arrive in order, so that the bucket is complete when its last part is.
            future = inflight.future
            if inflight.is_over:
                continue
            if self.mode.max_grad_norm is not None:
                self._waiting.append((buffers, inflight))
            else:
                self._submit(buffers, inflight)
        assert future is not None
        return future

    def _submit(self, buffers: BucketBuffers, inflight: InflightBucket) -> None:
        assert self.connection.exchange is not None
        try:
            self.connection.exchange.submit(buffers, inflight)
        except Exception as error:  # raised by backward, like an error of a worker thread
            self.connection.watchdog.broke(inflight, error)

    def release(self) -> None:
        """Submit the buckets that wait for the norm of the worker's gradient, after the last bucket."""
        if not self._waiting:
            return
        most = self.mode.max_grad_norm
        assert most is not None
        if self.topology.shares > 1:  # the worker is the node
            bound = NodeBound(most, len(self._waiting))
            for buffers, _ in self._waiting:
                buffers.hold(bound)
        else:
            flats = [buffers.bucket for buffers, _ in self._waiting]
            norms = [
                torch.linalg.vector_norm(flat, dtype=compute_dtype(flat.dtype)) for flat in flats
            ]
            norm = torch.stack([norm.float() for norm in norms]).norm()
            factor = (most / (norm + 1e-6)).clamp(max=1.0)
            for flat in flats:
                flat.mul_(factor.to(flat.dtype))
        for buffers, inflight in self._waiting:
            self._submit(buffers, inflight)
        self._waiting.clear()

    def begin_step(self) -> None:
        """End a step that was interrupted, before the first bucket of the next one."""
        for _, inflight in self._waiting:
            inflight.succeed()  # with the bucket as it is, which nobody reads
        self._waiting.clear()
        self.settle()

    def settle(self) -> None:
        """Wait for the buckets in flight, so that residuals can be read and written.

        A backward that an error has ended leaves buckets in flight: they end as on the other ranks, and
        their residuals are those after the exchange. Without such buckets there is no wait.
        """
        if self._waiting:  # none of this step has been submitted yet
            return
        if self.connection.has_agreed:
            self.connection.watchdog.join()
        if self.connection.exchange is not None:
            self.connection.exchange.settle()

    def restore_unused(self) -> None:
        """Undo the step of the parameters that no rank used, after gradients have been written."""
        for buffers in self.buckets:
            buffers.restore_unused()

    def average(self, index: int, flat: Tensor, tensors: Sequence[Tensor]) -> Future[Tensor]:
        """Average a bucket by a dense all-reduce.

        Args:
            index: Index of the bucket in the step.
            flat: ``[numel]``, or a sparse tensor; overwritten with the mean.
            tensors: The owners of the elements.

        Returns:
            A future of ``flat``.
        """
        numel = flat.numel()
        if flat.is_sparse:
            for tensor in tensors:
                self.bypassed[self.parameters.find(tensor).name] = "sparse gradient"
            numel = flat._values().numel()
        size = numel * flat.element_size()
        self.counters.count(size, size, size)
        if self._dense is None:
            self._dense = DenseExchange(self.group, self.connection.watchdog)
        also = self.mode.begin_dense(tensors, flat)
        return self._dense.submit(f"bucket {index}", flat, also)

    def refuse(self, index: int, flat: Tensor) -> Future[Tensor]:
        """Complete a bucket as it is, because the exchange has stopped.

        Args:
            index: Index of the bucket in the step.
            flat: ``[numel]``.

        Returns:
            A future of ``flat``.
        """
        watchdog = self.connection.watchdog
        return watchdog.enter(f"bucket {index}", "", "", "", flat, new_future(flat.device)).future


def exchange_all(
    session: ExchangeSession, flats: Iterable[Tensor], buckets: Sequence[Sequence[Tensor]]
) -> None:
    """Exchange all buckets of a model at once; a collective operation.

    Args:
        session: The session; opened here if it is not open.
        flats: ``[numel]`` each, the elements of one bucket, overwritten with the result.
        buckets: The tensors of each bucket.
    """
    futures = []
    for index, (flat, tensors) in enumerate(zip(flats, buckets, strict=True)):
        if not session.connection.has_agreed:
            session.agree(flat.device)
        session.open(flat.device)
        futures.append(session.exchange(index, flat, tensors))
    session.release()
    session.counters.steps += 1
    torch.futures.wait_all(futures)
