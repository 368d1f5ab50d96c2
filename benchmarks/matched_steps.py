"""Measure whether update mode does at AdamW's own settings what DDP with AdamW does.

    python benchmarks/matched_steps.py                                # text and GRU, 4 workers, seed 0
    python benchmarks/matched_steps.py --tasks gru --workers 2 8 --seeds 0 1

All workers are simulated in one process, with the arithmetic of matched second moments in plain torch:
`text` is the model of `examples/train_text.py`, `gru` a recurrent one (width 128) on the same bytes,
both with 600 steps of AdamW, 6e-3 and betas .9 .999. A method is `dense`, a quantizer, or
QUANTIZER/local for local second moments without matching. Runs take about a minute of one core for four
workers; each prints one line.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from effadam_hook.wire.quantizers import Quantizer, get_quantizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_text import Text, TextOptions

BLOCK = 256
BATCH = 8
WARMUP = 50
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class GRU(nn.Module):
    """A recurrent model over bytes."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, 64)
        self.recurrent = nn.GRU(64, width, batch_first=True)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits [batch, context, 256] of the next byte at every position."""
        return self.head(self.recurrent(self.bytes(tokens))[0])


def quantize(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Quantize blocks ``[..., BLOCK]`` with least-squares scales, and decode them."""
    if quantizer.is_raw:
        return x
    if quantizer.spread is None:
        unit = x.abs().amax(-1, keepdim=True) / quantizer.magnitudes[-1]
    else:
        unit = x.square().mean(-1, keepdim=True).sqrt() * quantizer.spread
    levels, thresholds = torch.tensor(quantizer.magnitudes), torch.tensor(quantizer.thresholds)
    codes = levels[torch.bucketize(x.abs() / unit.clamp(min=1e-30), thresholds)]
    codes = torch.where(x < 0, -codes, codes)
    scale = (x * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(
        min=1e-30
    )
    return codes * scale.bfloat16().float()


class Workers:
    """Update mode of several workers, on one flat vector of all parameters.

    Args:
        sizes: Numbers of elements of the parameters; those of ``compressed`` elements are first.
        compressed: Number of elements that are quantized, a multiple of :data:`BLOCK`.
        workers: Number of workers.
        quantizer: Quantizer of both directions.
        matched: Whether steps and momentum are matched to those of DDP with AdamW.
    """

    def __init__(
        self, sizes: list[int], compressed: int, workers: int, quantizer: str, matched: bool
    ) -> None:
        self.sizes, self.compressed, self.workers = sizes, compressed, workers
        self.quantizer, self.matched = get_quantizer(quantizer), matched
        self.beta1 = BETA1 * (self.quantizer.energy**2 if matched else 1.0)
        self.first, self.second = (torch.zeros(workers, sum(sizes)) for _ in range(2))
        self.residual = torch.zeros(workers, compressed)
        self.server_residual = torch.zeros(compressed)
        self.energy = torch.zeros(len(sizes))
        self.noise = self.seen = 0.0
        self.steps = 0

    def step(self, gradients: Tensor) -> Tensor:
        """Return the step of all parameters for a learning rate of 1."""
        self.steps += 1
        decay = self.beta1**self.steps
        self.first.mul_(self.beta1).add_(gradients, alpha=1 - self.beta1)
        self.second.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        root = (self.second / (1 - BETA2**self.steps)).sqrt_().add_(EPS)
        updates = self.first / (1 - decay) / root
        sent = updates[:, : self.compressed] + self.residual
        decoded = quantize(sent.view(self.workers, -1, BLOCK), self.quantizer).view_as(sent)
        self.residual = sent - decoded
        mean = decoded.mean(0) + self.server_residual
        result = quantize(mean.view(-1, BLOCK), self.quantizer).flatten()
        self.server_residual = mean - result
        update = torch.cat([result, updates[:, self.compressed :].mean(0)])
        return update * self._factors(update, decay) if self.matched else update

    def _factors(self, update: Tensor, decay: float) -> Tensor:
        kappa = (1 - self.beta1) / (1 + self.beta1) * (1 + decay) / (1 - decay)
        energy = torch.stack([part.square().mean() for part in update.split(self.sizes)])
        self.energy.mul_(BETA2).add_(energy, alpha=1 - BETA2)
        self.noise = BETA2 * self.noise + (1 - BETA2) * kappa / self.workers
        self.seen = BETA2 * self.seen + 1 - BETA2
        rho = ((self.energy - self.noise) / (self.seen - self.noise)).clamp(0, 1)
        factors = (rho + (1 - rho) / self.workers).rsqrt()
        return torch.repeat_interleave(factors, torch.tensor(self.sizes))


def train(task: str, method: str, workers: int, seed: int, steps: int, peak: float) -> float:
    """Train one model, and return the validation loss in nats."""
    text = Text(TextOptions(None, 4_000_000, 64, 2, 128, 4))
    torch.manual_seed(seed)
    model = GRU() if task == "gru" else text.build_model()
    parameters = sorted(model.parameters(), key=lambda p: p.dim() == 1)
    sizes = [p.numel() for p in parameters]
    weights = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, weights.split(sizes), strict=True):
        p.data = part.view(p.shape)
    if method == "dense":
        exchange = Workers(sizes, 0, 1, "none", matched=False)
    else:
        quantizer, _, kind = method.partition("/")
        compressed = sum(p.numel() for p in parameters if p.dim() > 1)
        exchange = Workers(sizes, compressed, workers, quantizer, kind != "local")
    gradients = torch.zeros(workers, sum(sizes))
    for step in range(steps):
        for worker, flat in enumerate(gradients):
            tokens, following = text.sample(np.random.default_rng([seed, step + 1, worker]), BATCH)
            loss = functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())
            parts = torch.autograd.grad(loss, parameters)
            torch.cat([part.flatten() for part in parts], out=flat)
        done = (step - WARMUP) / max(1, steps - WARMUP)
        rate = (step + 1) / WARMUP if step < WARMUP else (1 + math.cos(math.pi * done)) / 2
        mean = gradients.mean(0, keepdim=True) if method == "dense" else gradients
        weights -= peak * rate * exchange.step(mean)
    tokens, following = text.held_out()
    with torch.no_grad():
        losses = [
            functional.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
            for a, b in zip(tokens.split(64), following.split(64), strict=True)
        ]
    return sum(losses) / following.numel()


def main() -> None:
    """Run all combinations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=("text", "gru"), default=["text", "gru"])
    parser.add_argument("--methods", nargs="+", default=["dense", "none", "lloyd2", "sign"])
    parser.add_argument("--workers", nargs="+", type=int, default=[4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=6e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | workers | seed | method | loss |\n|---|---:|---:|---|---:|")
    for task in options.tasks:
        for workers in options.workers:
            for seed in options.seeds:
                for method in options.methods:
                    loss = train(task, method, workers, seed, options.steps, options.lr)
                    print(f"| {task} | {workers} | {seed} | {method} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
