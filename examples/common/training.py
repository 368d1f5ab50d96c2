"""Training loop of all examples: DistributedDataParallel, and one optional line.

Everything in a step is a function of (seed, step, rank). A run that was interrupted and resumed is
therefore bit-identical to an uninterrupted one, and runs in different modes use the same data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .launch import Worker
from .options import Mode, Options, exchange_arguments
from .progress import Progress

if TYPE_CHECKING:
    from effadam_hook import EfficientAdamState
    from effadam_hook.run_log import RunLog

EVALUATION_CHUNK = 64  # held-out samples per forward


class Task(Protocol):
    """Classification problem, such as the next byte or a digit."""

    name: str
    headline: str  # the metric to plot: "loss" or "accuracy"
    held_out_name: str  # "validation" or "test"
    unit: str  # unit of throughput, in the plural
    units_per_sample: int

    @property
    def description(self) -> str:
        """Return a one-line description of the data."""

    def build_model(self) -> nn.Module:
        """Make a model that returns logits, with classes in the last dimension."""

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Draw `count` random training samples and their classes."""

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the fixed evaluation samples and their classes."""


@dataclass
class Point:
    """Results after `step` steps. Bytes and seconds count from the start of the run.

    Attributes:
        step: Number of optimizer steps.
        train_loss: Mean over all workers and the steps since the previous point, in nats.
        loss: Mean over the held-out samples, in nats.
        accuracy: Fraction of held-out samples that are classified correctly.
        uplink_bytes: Bytes that one worker has sent to the server.
        downlink_bytes: Bytes that one worker has received from the server.
        seconds: Training time without evaluation.
    """

    step: int
    train_loss: float
    loss: float
    accuracy: float
    uplink_bytes: int
    downlink_bytes: int
    seconds: float


@dataclass
class Run:
    """Training curve of one mode.

    Attributes:
        mode: Label of the mode.
        dense_bytes_per_step: Bytes of an fp32 exchange, for one worker and one direction.
        units_per_step: Tokens or images processed by all workers together.
        points: Points of the curve.
    """

    mode: str
    dense_bytes_per_step: int
    units_per_step: int
    points: list[Point] = field(default_factory=list)

    @property
    def final(self) -> Point:
        """Return the last point."""
        return self.points[-1]

    @property
    def ratio(self) -> float:
        """Return the bytes of an fp32 exchange divided by those of the run, in both directions."""
        sent = self.final.uplink_bytes + self.final.downlink_bytes
        return 2 * self.dense_bytes_per_step * self.final.step / sent if sent else math.nan

    @property
    def units_per_second(self) -> float:
        """Return the training throughput of all workers together."""
        return self.units_per_step * self.final.step / self.final.seconds


class Wire:
    """Counter of the bytes that one worker sends to the server (up) and receives from it (down).

    A dense step counts as 4 bytes per parameter and direction. A ring all-reduce and the sharded
    topology move (N-1)/N of these counts between N machines, so ratios are unaffected.
    """

    def __init__(self, dense_bytes_per_step: int, state: EfficientAdamState | None) -> None:
        self._dense_bytes_per_step = dense_bytes_per_step
        self._state = state

    def read(self, step: int) -> tuple[int, int]:
        """Return the bytes up and down in the first `step` steps of the run."""
        if self._state is None:
            return self._dense_bytes_per_step * step, self._dense_bytes_per_step * step
        stats = self._state.stats()
        return int(stats["uplink_bytes"]), int(stats["downlink_bytes"])


class Training:
    """One run: model, optimizer, exchange and training loop.

    Args:
        task: Data and model.
        mode: Dense, or the quantizers.
        options: Options of the command line.
        worker: This worker.
        settings: Settings that checkpoints must match, from `checkpoint.fingerprint`.
    """

    def __init__(
        self, task: Task, mode: Mode, options: Options, worker: Worker, settings: str
    ) -> None:
        torch.manual_seed(options.seed)
        self.task = task
        self.options = options
        self.worker = worker
        self.settings = settings
        self.model = task.build_model().to(worker.device)
        self.optimizer = build_optimizer(self.model.parameters(), mode, options)
        self.ddp_model = self.wrap()
        self.state = attach_state(self.ddp_model, self.optimizer, mode, options)
        self.held_out = tuple(part[worker.rank :: worker.world_size] for part in task.held_out())
        self.result = Run(
            mode.label,
            dense_bytes_per_step=4 * sum(each.numel() for each in self.model.parameters()),
            units_per_step=options.batch_size * worker.world_size * task.units_per_sample,
        )
        if options.resume:
            points = checkpoint.load(options.resume, worker, self.model, self.optimizer, self.state)
            self.result.points = [Point(**point) for point in points]
        self.wire = Wire(self.result.dense_bytes_per_step, self.state)
        self.log = open_log(mode, options, worker)
        self.progress = Progress(
            self.result, task, options.steps, enabled=worker.is_main, device=worker.device
        )

    def wrap(self) -> DistributedDataParallel:
        """Wrap the model in DDP; benchmarks override this method to register other hooks."""
        on_cpu = self.worker.device.type == "cpu"
        return DistributedDataParallel(
            self.model, device_ids=None if on_cpu else [self.worker.device]
        )

    def run(self) -> Run:
        """Train until the last step.

        Returns:
            The curve, equal on all workers except for the seconds.
        """
        points = self.result.points
        first = points[-1].step if points else 0
        seconds = points[-1].seconds if points else 0.0
        last = min(self.options.steps, self.options.stop_after or self.options.steps)
        losses: list[Tensor] = []
        clock = time.perf_counter()
        for step in range(first, last):
            losses.append(self._step(step))
            self.progress.step(step + 1, losses[-1], self.state)
            if self.log is not None:
                stats = self.state.stats() if self.state else {}
                self.log.write(step + 1, losses[-1].item(), **stats)
            if (step + 1) % self.options.validate_every and step + 1 != last:
                continue
            train_loss = mean_over_workers(torch.stack(losses).double().mean())
            seconds += time.perf_counter() - clock
            self._validate(step + 1, train_loss, seconds)
            if not math.isfinite(train_loss):
                self.progress.message("The loss is no longer finite: try a smaller --lr.")
                break
            losses.clear()
            clock = time.perf_counter()
        self.progress.close()
        if self.log is not None:
            self.log.close()
        if self.state is not None:
            self.state.close()
        return self.result

    def _step(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.options.seed, step, self.worker.rank])
        inputs, targets = self.task.sample(rng, self.options.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * lr_factor(
                step, self.options.steps, self.options.lr_warmup
            )
        logits = self.ddp_model(inputs.to(self.worker.device))
        loss = cross_entropy(logits, targets.to(self.worker.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _validate(self, step: int, train_loss: float, seconds: float) -> None:
        loss, accuracy = evaluate(self.model, self.held_out, self.worker)
        up, down = self.wire.read(step)
        point = Point(step, train_loss, loss, accuracy, up, down, seconds)
        self.result.points.append(point)
        self.progress.point(point)
        if self.options.checkpoint:
            checkpoint.save(
                self.options.checkpoint,
                self.worker,
                self.settings,
                [asdict(each) for each in self.result.points],
                self.model,
                self.optimizer,
                self.state,
            )


def open_log(mode: Mode, options: Options, worker: Worker) -> RunLog | None:
    """Open the log of the main worker, if requested; with `--compare`, one log for each mode."""
    if options.log is None or not worker.is_main:
        return None
    from effadam_hook.run_log import RunLog

    path = options.log
    if options.compare:
        path = path.with_suffix(f".{mode.label.replace('/', '-')}{path.suffix}")
    return RunLog(path, append=options.resume is not None)


def attach_state(
    ddp_model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    mode: Mode,
    options: Options,
) -> EfficientAdamState | None:
    """Attach the exchange of `mode` to the model; return None for a dense run."""
    if mode.is_dense:
        return None
    from effadam_hook import attach

    return attach(
        ddp_model,
        optimizer=None if options.exchange == "gradient" else optimizer,
        precondition=options.exchange == "preconditioned",
        quantize_weights=options.exchange == "weights",
        **exchange_arguments(options, mode),
    )


def build_optimizer(
    parameters: Iterable[nn.Parameter], mode: Mode, options: Options
) -> torch.optim.Optimizer:
    """Make EfficientAdam for the exchange of updates, and the optimizer of `--optimizer` otherwise."""
    if options.exchange in ("update", "weights") and not mode.is_dense:
        from effadam_hook import EfficientAdam

        return EfficientAdam(
            parameters,
            lr=options.lr,
            betas=(options.betas[0], options.betas[1]),
            weight_decay=options.weight_decay,
            second_moment=options.second_moment,
            refresh_every=options.refresh_every,
        )
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=options.lr, momentum=0.9, weight_decay=options.weight_decay
        )
    adam = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return adam(
        parameters,
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),
        weight_decay=options.weight_decay,
    )


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Compute the factor of a linear warm-up, then of half a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the cross-entropy in nats, for any number of leading dimensions."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, samples: tuple[Tensor, ...], worker: Worker) -> tuple[float, float]:
    """Compute mean loss and accuracy over the held-out samples, divided among the workers."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=worker.device)  # loss, correct, count
    chunks = zip(*(part.split(EVALUATION_CHUNK) for part in samples), strict=True)
    for inputs, targets in chunks:
        logits = model(inputs.to(worker.device))
        classes = targets.to(worker.device)
        totals[0] += cross_entropy(logits, classes, reduction="sum")
        totals[1] += (logits.argmax(-1) == classes).sum()
        totals[2] += targets.numel()
    dist.all_reduce(totals)
    model.train()
    loss, correct, count = totals.tolist()
    return loss / count, correct / count


def mean_over_workers(value: Tensor) -> float:
    """Compute the mean of one number per worker."""
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()
