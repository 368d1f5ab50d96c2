"""Training with Lightning in mixed precision."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import torch
from torch import nn

from gpu_check.outcome import SKIPPED, Checks, Context, SkipError, require
from gpu_check.step import perceptron
from harness import run_ranks

__all__ = ["run"]

EPOCHS, SAMPLES, BATCH = 5, 256, 32
STEPS = EPOCHS * SAMPLES // BATCH


def run(context: Context) -> Checks:
    """Train on one device with bf16-mixed and, on a GPU, with 16-mixed."""
    checks = Checks()
    precisions = ("bf16-mixed", "16-mixed") if context.device == "cuda" else ("bf16-mixed",)
    if context.device != "cuda":
        checks.add("16-mixed", SKIPPED, 'Trainer(precision="16-mixed") needs a GPU')
    for precision in precisions:
        checks.run(precision, lambda precision=precision: check(context, precision))
    return checks


def check(context: Context, precision: str) -> str:
    if importlib.util.find_spec("lightning") is None:
        raise SkipError("`import lightning` fails: Lightning is not installed")
    (found,) = run_ranks(
        fit,
        1,
        context.device,
        precision,
        backend=None,
        timeout=max(30.0, context.left_s + 0.3 * context.seconds),
        fresh=context.device == "cuda",  # a process that is forked cannot use CUDA
    )
    first, last, steps = found
    require(last < first, f"the loss went from {first:.4f} to {last:.4f}. Must fall.")
    require(steps == STEPS, f"the hook has run in {steps} of {STEPS} steps")
    return f"loss {first:.4f} to {last:.4f}"


def fit(rank: int, world_size: int, device: str, precision: str) -> tuple[float, float, int]:
    """Fit a small model, and return the first and the last loss, and the hook's steps."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_plugin import EfficientAdamStrategy

    losses: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            loss = nn.functional.mse_loss(self.body(batch[0]), batch[1])
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 64)
    data = DataLoader(TensorDataset(x, x[:, :8].tanh()), batch_size=BATCH)
    strategy: Any = EfficientAdamStrategy(quantizer="lloyd4")
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(Module(), data)
        steps = strategy.hook_state.steps if strategy.hook_state is not None else 0
    return losses[0], losses[-1], steps
