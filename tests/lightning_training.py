"""Training for the Lightning tests: a small network on random data, in either family."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FAMILIES = ("lightning.pytorch", "pytorch_lightning")
SAMPLES = 96
BATCH = 4


def pose_as_torchrun(rank: int, world_size: int) -> None:
    """Make Lightning believe that torchrun has started this process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
        TORCHELASTIC_RUN_ID="test",
    )


def data(outputs: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 23, generator=generator)
    return TensorDataset(inputs, inputs[:, :outputs].abs())


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 37), nn.Tanh(), nn.Linear(37, 5)
    )


def make_module(
    family: Any,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    body: Callable[[], nn.Module] = network,
) -> Any:
    """A LightningModule of a family, always with the same initial weights."""

    class Regression(family.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = body()

        def loss(self, batch: list[Tensor]) -> Tensor:
            inputs, targets = batch
            return nn.functional.mse_loss(self.body(inputs.to(self.dtype)), targets.to(self.dtype))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

        test_step = validation_step

        def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.body(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            make = make_optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=3e-3))
            return make(self.parameters())

    return Regression()


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=BATCH)


def make_trainer(family: Any, strategy: Any, folder: str, **options: Any) -> Any:
    """A Trainer that prints nothing and writes only what it is asked to."""
    silent = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return family.Trainer(
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            strategy=strategy,
            default_root_dir=folder,
            **{**silent, "max_epochs": 1, **options},
        )


def load_family(name: str) -> Any:
    return import_module(name)


def weights(module: Any) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
