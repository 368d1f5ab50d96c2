"""Runs of the benchmarks of quality: one JSON line each, written when the run ends.

Runs that are in the file are skipped: an interrupted benchmark continues. Delete lines after a change
of the code. The processor time is that of all simulated workers together, with validation.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from quality_tasks import Task, lr_factor
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["RESULTS", "Record", "Schedule", "markdown", "read", "train", "write"]


class Trainer(Protocol):
    """Workers that train a model, such as :class:`simulation.Simulation`."""

    optimizers: Sequence[Optimizer]
    """All optimizers, for changes of the learning rate."""
    bytes_per_step: int
    """Bytes of one worker in the last step, both directions together."""

    def step(self, loss_of: Callable[[nn.Module, int], Tensor]) -> float:
        """Make one step, and return the mean loss."""
        ...


RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of a run: a linear warm-up, then half a cosine to 0."""

    steps: int
    warmup: int
    validate_every: int

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate."""
        return lr_factor(step, self.steps, self.warmup)


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        run: Name of the run: task, method, settings and seed.
        settings: The learning rate and other settings, as text.
        workers: Number of workers.
        numel: Number of trained parameters.
        bytes_per_step: Bytes of one worker in a step, both directions together, on average.
        steps: Optimizer steps at each validation.
        losses: Validation losses, in nats.
        accuracies: Validation accuracies.
        cpu_s: Processor time in seconds.
        torch: Version of torch.
    """

    run: str
    settings: str
    workers: int
    numel: int
    bytes_per_step: float
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    cpu_s: float
    torch: str

    @property
    def megabytes(self) -> list[float]:
        """Megabytes of one worker until each validation, both directions together."""
        return [step * self.bytes_per_step / 1e6 for step in self.steps]

    def until(self, target: float) -> float:
        """Interpolate the steps until a loss; NaN if it was not reached."""
        points = list(zip(self.steps, self.losses, strict=True))
        for (before, high), (after, low) in itertools.pairwise(points):
            if low <= target < high:
                return before + (after - before) * (high - target) / (high - low)
        return math.nan


def train(
    run: str,
    settings: str,
    task: Task,
    build: Callable[[nn.Module], Trainer],
    workers: int,
    schedule: Schedule,
    seed: int,
) -> tuple[Record, nn.Module]:
    """Train a model of a task.

    Args:
        run: Name of the run.
        settings: Text for the record.
        task: The task.
        build: Makes the workers for a model.
        workers: Number of workers.
        schedule: Steps and learning rate.
        seed: Seed of the model and the data.

    Returns:
        The record and the trained model. A run ends early if its loss is not finite.
    """
    torch.manual_seed(seed)
    model = task.build_model()
    simulation = build(model)
    groups = [group for optimizer in simulation.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    steps, losses, accuracies = [], [], []
    sent, clock = 0, time.process_time()
    for step in range(schedule.steps):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(step)
        simulation.step(lambda model, worker, step=step: task.loss(model, seed, step, worker))
        sent += simulation.bytes_per_step
        if (step + 1) % schedule.validate_every == 0 or step + 1 == schedule.steps:
            loss, accuracy = task.evaluate(model)
            steps.append(step + 1)
            losses.append(round(loss, 5))
            accuracies.append(round(accuracy, 5))
            print(f"{run}: step {step + 1}, loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)
            if not math.isfinite(loss):
                break
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cpu_s = round(time.process_time() - clock, 1)
    per_step = sent / steps[-1]
    columns = (steps, losses, accuracies, cpu_s, torch.__version__)
    return Record(run, settings, workers, numel, per_step, *columns), model


def read(path: Path) -> dict[str, Record]:
    """Read the records of a file by the name of the run; empty if there is no file."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    return {record.run: record for record in (Record(**json.loads(line)) for line in lines)}


def write(path: Path, record: Record) -> None:
    """Append a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = asdict(record)
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a markdown table."""
    names = list(header)
    lines = [f"| {' | '.join(names)} |", f"|---{'|---:' * (len(names) - 1)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
