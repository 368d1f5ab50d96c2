"""The examples' tasks as LightningModule and LightningDataModule, and a command line for comparisons.

The plain DDP examples use the training loop of `training.py`; here the Trainer runs the loop. Both
report with the same table and plot.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from effadam_hook import EfficientAdam

from . import report
from .training import EVALUATION_CHUNK, Point, Run, Task, cross_entropy

Batch = tuple[Tensor, Tensor]


class Samples(IterableDataset[Batch]):
    """Infinite sequence of batches that depend only on seed, step and rank."""

    def __init__(self, task: Task, batch_size: int, seed: int, rank: int, first: int) -> None:
        self.task = task
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.first = first

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, starting at step `first`."""
        step = self.first
        while True:
            rng = np.random.default_rng([self.seed, step, self.rank])
            yield self.task.sample(rng, self.batch_size)
            step += 1


class TaskData(pl.LightningDataModule):
    """Samples of a task, which the subclass selects."""

    def __init__(self, task: Task, batch_size: int, seed: int) -> None:
        super().__init__()
        self.task = task
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return random samples, different on each rank."""
        assert self.trainer is not None
        rank, step = self.trainer.global_rank, self.trainer.global_step
        samples = Samples(self.task, self.batch_size, self.seed, rank, step)
        return DataLoader(samples, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out samples, which Lightning divides among the ranks."""
        return DataLoader(TensorDataset(*self.task.held_out()), batch_size=EVALUATION_CHUNK)


class TaskModule(pl.LightningModule):
    """Classifier whose network the subclass builds."""

    def __init__(self, lr: float, lr_warmup: int, weight_decay: float, update_mode: bool) -> None:
        super().__init__()
        self.lr = lr
        self.lr_warmup = lr_warmup
        self.weight_decay = weight_decay
        self.update_mode = update_mode
        self.network: torch.nn.Module

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch."""
        inputs, targets = batch
        loss = cross_entropy(self.network(inputs), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of one batch, averaged over all batches."""
        inputs, targets = batch
        logits = self.network(inputs)
        accuracy = (logits.argmax(-1) == targets).float().mean()
        for name, value in (("val_loss", cross_entropy(logits, targets)), ("accuracy", accuracy)):
            self.log(name, value, prog_bar=True, sync_dist=True, batch_size=len(inputs))

    def configure_optimizers(self) -> dict[str, Any]:
        """Make AdamW, or EfficientAdam for update mode, with warm-up and cosine decay to 0."""
        optimizer: torch.optim.Optimizer
        if self.update_mode:
            optimizer = EfficientAdam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=self.lr, weight_decay=self.weight_decay
            )
        steps = self.trainer.max_steps

        def factor(step: int) -> float:
            if step < self.lr_warmup:
                return (step + 1) / self.lr_warmup
            done = (step - self.lr_warmup) / max(1, steps - self.lr_warmup)
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Curve(pl.Callback):
    """Callback that records one point of the curve after every validation."""

    def __init__(self, mode: str, task: Task) -> None:
        self.mode = mode
        self.task = task
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        numel = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        units = batch_size * trainer.world_size * self.task.units_per_sample
        self.run = Run(self.mode, dense_bytes_per_step=4 * numel, units_per_step=units)
        self.clock = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if not trainer.sanity_checking:
            self.seconds += time.perf_counter() - self.clock

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record a point."""
        if trainer.sanity_checking:
            return
        state = getattr(trainer.strategy, "hook_state", None)
        sent = self.run.dense_bytes_per_step * trainer.global_step
        stats = state.stats() if state else {"uplink_bytes": sent, "downlink_bytes": sent}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.run.points.append(
            Point(
                trainer.global_step,
                metrics["loss"],
                metrics["val_loss"],
                metrics["accuracy"],
                int(stats["uplink_bytes"]),
                int(stats["downlink_bytes"]),
                self.seconds,
            )
        )
        self.clock = time.perf_counter()


class ComparingCLI(LightningCLI):
    """LightningCLI with `--compare`, which trains with plain `ddp` before the configured strategy."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong neither to the Trainer nor to model and data."""
        parser.add_argument(
            "--compare", action="store_true", help="train with plain ddp first, and compare"
        )
        parser.add_argument(
            "--plot", type=str | None, default=None, help="a PNG file for the curves, or null"
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="resume from this checkpoint"
        )


def start(
    module: type[TaskModule],
    data: type[TaskData],
    config: Path,
    args: ArgsType = None,
    link: Callable[[LightningArgumentParser], None] = lambda parser: None,
) -> list[Run]:
    """Parse the command line, train once or twice, and print the report.

    Args:
        module: Class of the model.
        data: Class of the data.
        config: YAML file with the defaults.
        args: Arguments; None for those of the process.
        link: Function that links options of the model to options of the data.

    Returns:
        The curves; plain `ddp` first, with `--compare`.
    """

    class CLI(ComparingCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            link(parser)

    cli = CLI(
        module,
        data,
        run=False,
        args=args,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={"default_config_files": [str(config)]},
    )
    strategy = cli.trainer.strategy
    options = getattr(strategy, "_hook_options", None)
    label = f"effadam {options['quantizer']}" if options else "ddp"
    modes = [(label, cli.trainer)]
    if cli.config.compare:
        modes.insert(0, ("ddp", cli.instantiate_trainer(strategy="ddp")))
    runs = []
    for name, trainer in modes:
        model = copy.deepcopy(cli.model)
        if name == "ddp":
            model.update_mode = False
        curve = Curve(name, cli.datamodule.task)
        trainer.callbacks.append(curve)
        trainer.fit(model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
        runs.append(curve.run)
    if not all(run.points for run in runs):
        if cli.trainer.is_global_zero:
            print(
                f"The run ended before its first validation, after {cli.trainer.global_step} steps: "
                "there is no table. Lower --trainer.val_check_interval, or raise --trainer.max_steps."
            )
    elif cli.trainer.is_global_zero:
        print(f"\n{report.table(runs, cli.datamodule.task)}")
        if cli.config.plot:
            report.plot(Path(cli.config.plot), runs, cli.datamodule.task)
            print(f"Wrote {cli.config.plot}")
    return runs
