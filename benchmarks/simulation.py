"""Several workers in one process, with the bits of as many ranks: for experiments on quality.

Workers take turns: each computes its gradient with the same model, and the buffers of the session, the
kernels, the modes and the optimizers of the package do the rest. Only the collectives are replaced, by
copies between the buffers of the workers::

    simulation = Simulation(model, lambda p: [AdamW(p, lr=6e-3)], workers=4, quantizer="lloyd4")
    simulation.step(lambda model, worker: loss of the worker's batch)

`tests/test_simulation.py` compares the weights with those of real processes. One thread computes a step
of all workers, which needs less processor time than as many processes. The topologies "rank0" and
"sharded" give the same bits. Steps with a dense average, of a warm-up or a shared second moment, are
refused: the order of their sums is that of Gloo.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from effadam_hook import EfficientAdam
from effadam_hook.config import Config
from effadam_hook.config.options import StateOptions, complete_options
from effadam_hook.exchange.staging import Staging
from effadam_hook.exchange.topology import FLAT_TOPOLOGIES
from effadam_hook.feedback.parameters import ParameterTable, shaped_view
from effadam_hook.feedback.residuals import Residuals
from effadam_hook.kernels import Kernels, select
from effadam_hook.modes import GradientMode, Mode, PreconditionedMode, UpdateMode
from effadam_hook.session.block_size import BlockSize
from effadam_hook.session.buckets import Buckets
from effadam_hook.session.buffers import BucketBuffers

Named = Sequence[tuple[str, nn.Parameter]]
Average = Callable[[list[Tensor]], None]
"""Replaces the gradients ``[numel]`` of all workers by their mean, or by an estimate of it."""


def dense_mean(flats: list[Tensor]) -> None:
    """Replace all tensors by their mean, summed in their order."""
    mean = flats[0]
    for flat in flats[1:]:
        mean.add_(flat)
    mean.div_(len(flats))
    for flat in flats[1:]:
        flat.copy_(mean)


class _Worker:
    """One rank, as the buffers of its bucket need it."""

    group: Any = None  # read for the node's memory only, which flat topologies do not have

    def __init__(self, rank: int, workers: int, named: Named, mode: Mode, config: Config) -> None:
        self.config = config
        self.mode = mode
        self.topology = FLAT_TOPOLOGIES[config.topology](rank, workers)
        self.parameters = ParameterTable()
        self.parameters.bind(named)
        self.blocks = BlockSize(config, self.parameters)
        self.worker = Residuals()
        self.server = Residuals()
        self._tensors = [parameter for _, parameter in named]
        self._buckets = Buckets()
        self._staging = Staging()

    def job(self, flat: Tensor, kernels: Kernels) -> BucketBuffers:
        """Return the buffers of the one bucket."""
        tensors, staging = self._tensors, self._staging
        (job,) = self._buckets.of(0, flat, tensors, self, None, kernels, staging, "")
        return job


class SimulatedExchange:
    """The two-way exchange of one bucket between workers in this process.

    Args:
        named: The names and parameters of each worker; workers may share them.
        modes: The mode of each worker; workers may share it.
        config: The options; the topology is "rank0" or "sharded".

    Attributes:
        bytes_per_step: Payload bytes of one worker, both directions together.
    """

    def __init__(self, named: Sequence[Named], modes: Sequence[Mode], config: Config) -> None:
        if config.warmup_steps:
            raise ValueError(
                f"Invalid warmup_steps: {config.warmup_steps}. Must be 0: a simulation has no dense "
                "steps."
            )
        if config.topology not in FLAT_TOPOLOGIES:
            raise ValueError(
                f"Invalid topology: {config.topology!r}. Must be one of {', '.join(FLAT_TOPOLOGIES)}."
            )
        self.bytes_per_step = 0
        self._workers = [
            _Worker(rank, len(named), own, mode, config)
            for rank, (own, mode) in enumerate(zip(named, modes, strict=True))
        ]
        for mode in modes:
            mode.connect(len(named), config.uplink.energy * config.downlink.energy)
        self._kernels = select(torch.device("cpu"))

    def run(self, flats: Sequence[Tensor]) -> None:
        """Replace every worker's vector ``[numel]`` by the result of the exchange."""
        jobs = [
            worker.job(flat, self._kernels)
            for worker, flat in zip(self._workers, flats, strict=True)
        ]
        for job, flat in zip(jobs, flats, strict=True):
            job.load(flat, check_weights=False)
            if job.averages_first:
                raise ValueError(
                    'Invalid second_moment. Must be "matched" or "local" in a simulation.'
                )
            job.encode()
        for chunk, rank in enumerate(self._workers[0].topology.server_ranks):
            server = jobs[rank]
            for job, received in zip(jobs, server.received, strict=True):
                received.copy_(job.uplink[chunk])
            server.reduce()
            for job in jobs:
                job.downlink[chunk].copy_(server.outgoing[0])
        for job in jobs:
            job.decode()
        layout = jobs[0].layout
        self.bytes_per_step = layout.uplink.payload_bytes + layout.downlink.payload_bytes


class Simulation:
    """Train one model on the data of several workers.

    Args:
        model: The model. Workers share it: their replicas would be identical.
        build_optimizers: Makes the optimizers of a list of parameters. One ``EfficientAdam`` selects
            update mode; each worker then has its own, for its moments.
        workers: Number of workers.
        average: Averages gradients instead of the exchange, such as :func:`dense_mean`.
        precondition: Whether the first optimizer, an Adam or AdamW, preconditions the exchange.
        **options: Options of the exchange, as for :func:`effadam_hook.attach`.

    Attributes:
        model: The model.
        optimizers: All optimizers, for changes of the learning rate.
        bytes_per_step: Bytes of one worker in the last step, both directions together; 8 for
            each element without an exchange.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizers: Callable[[list[nn.Parameter]], Sequence[Optimizer]],
        workers: int,
        *,
        average: Average | None = None,
        precondition: bool = False,
        **options: Any,
    ) -> None:
        self.model = model
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        own = list(build_optimizers([p for _, p in self._named]))
        self._replicas = [self._named]
        self.optimizers = own
        self._average = average
        self._exchange: SimulatedExchange | None = None
        self._modes: list[Mode] = [GradientMode()]
        if isinstance(own[0], EfficientAdam):
            # The weights of the copies remain equal to those of the model.
            copies = [copy.deepcopy(self._named) for _ in range(workers - 1)]
            self._replicas += copies
            self.optimizers += [build_optimizers([p for _, p in each])[0] for each in copies]
            self._modes = [
                _update_mode(optimizer, named)
                for optimizer, named in zip(self.optimizers, self._replicas, strict=True)
            ]
        elif precondition:
            self._modes = [PreconditionedMode(own[0])]
        if average is None:
            complete = complete_options({"topology": "rank0", **options}, StateOptions)
            self._exchange = SimulatedExchange(
                [self._replicas[rank % len(self._replicas)] for rank in range(workers)],
                [self._modes[rank % len(self._modes)] for rank in range(workers)],
                Config.from_options(complete),
            )
        elif options or precondition or len(self._replicas) > 1:
            raise ValueError(
                "Invalid average: given with options of the exchange. Must be alone, in gradient mode."
            )
        numel = sum(p.numel() for _, p in self._named)
        self.bytes_per_step = 8 * numel
        self._flats = [torch.zeros(numel) for _ in range(workers)]

    def step(self, loss_of: Callable[[nn.Module, int], Tensor]) -> float:
        """Make one optimizer step.

        Args:
            loss_of: Computes the loss of a worker's batch, from the model and the number of the worker.

        Returns:
            The mean loss of all workers.
        """
        loss = self._compute_gradients(loss_of)
        for mode in self._modes:
            mode.begin_backward(joins=False)
        if self._average is not None:
            self._average(self._flats)
        if self._exchange is not None:
            self._exchange.run(self._flats)
            self.bytes_per_step = self._exchange.bytes_per_step
        for flat, named in zip(self._flats, self._replicas, strict=False):
            for (_, parameter), view in zip(named, _views(flat, named), strict=True):
                parameter.grad = view
        for mode in self._modes:
            mode.end_backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def _compute_gradients(self, loss_of: Callable[[nn.Module, int], Tensor]) -> float:
        """Fill the vectors of all workers with their gradients; return the mean loss."""
        # DDP sends the buffers of rank 0, such as running means, to all ranks before every forward.
        before = [buffer.clone() for buffer in self.model.buffers()]
        total = 0.0
        for worker, flat in reversed(list(enumerate(self._flats))):
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)
            for _, parameter in self._named:
                parameter.grad = None
            loss = loss_of(self.model, worker)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            for (name, parameter), view in zip(self._named, _views(flat, self._named), strict=True):
                if parameter.grad is None:
                    raise ValueError(f"Parameter {name!r} has no gradient. Freeze it, or use it.")
                view.copy_(parameter.grad)
        return total / len(self._flats)


def _update_mode(optimizer: Optimizer, named: Named) -> UpdateMode:
    assert isinstance(optimizer, EfficientAdam)
    optimizer.recursion.attach_to(named)
    return UpdateMode(optimizer)


def _views(flat: Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
    views, start = [], 0
    for _, parameter in named:
        end = start + parameter.numel()
        views.append(shaped_view(flat[start:end], parameter))
        start = end
    return views
