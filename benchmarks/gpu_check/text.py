"""Train a small GPT on source code, dense and compressed, for the same number of steps."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach
from gpu_check.device import device_of
from gpu_check.outcome import Checks, Context, require
from harness import run_ranks

__all__ = ["run"]

STARTUP_S = 20.0
CHECK_EVERY = 5
# In nats a byte, after some hundred steps; runs differ by about .01 between seeds.
LARGEST_DIFFERENCE, LEAST_STEPS = 0.05, 300


@dataclass(frozen=True)
class Size:
    """Size of the model and of a batch of one rank."""

    context: int
    width: int
    layers: int
    batch: int


FULL, TRIAL = Size(128, 256, 4, 32), Size(16, 32, 1, 4)


def run(context: Context) -> Checks:
    """Compare the validation loss of 4 bits with that of a dense run, on two ranks."""
    checks = Checks()
    checks.run("lloyd4 against dense", lambda: compare(context))
    return checks


def compare(context: Context) -> str:
    device = device_of(context.device)
    backend = device.backend if device.count > 1 else "gloo"
    half_s = context.seconds / 2
    train_s = half_s - STARTUP_S if device.is_gpu else 0.5
    require(train_s > 0, f"{context.seconds:.0f} s are too few. Give --minutes or --sections text.")

    def train(enabled: bool, steps: int | None, limit_s: float) -> dict[str, Any]:
        results = run_ranks(
            trained,
            2,
            context.device,
            enabled,
            train_s,
            steps,
            FULL if device.is_gpu else TRIAL,
            timeout=limit_s,
            backend=backend,
            fresh=device.is_gpu,  # a process that is forked cannot use CUDA
        )
        found: dict[str, Any] = results[0]
        return found

    dense = train(False, None, max(30.0, 1.4 * half_s))
    ours = train(True, dense["steps"], max(30.0, context.left_s + 0.5 * context.seconds))
    steps = int(dense["steps"])
    detail = (
        f"validation loss {ours['loss']:.4f}, dense {dense['loss']:.4f} after {steps} steps over "
        f"{backend}; {1e3 * ours['seconds'] / steps:.1f} ms a step, dense "
        f"{1e3 * dense['seconds'] / steps:.1f} ms; {ours['ratio']:.1f} times fewer bytes"
    )
    learned = dense["start"] - dense["loss"]
    require(learned > 0, f"{detail}. The dense run has learned nothing.")
    allowed = LARGEST_DIFFERENCE if steps >= LEAST_STEPS else max(LARGEST_DIFFERENCE, learned / 4)
    require(
        ours["loss"] - dense["loss"] < allowed,
        f"{detail}. The difference must be below {allowed:.3f}.",
    )
    if steps < LEAST_STEPS:
        detail += f". {steps} steps are too few for a judgement, which {LEAST_STEPS} allow"
    return detail


class Model(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(size.context, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.bytes(tokens) + self.places(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        predicted: Tensor = self.head(self.body(x, mask=mask, is_causal=True))
        return predicted


def text() -> Tensor:
    """Return the source of Python's standard library as bytes, at most 4 MB."""
    folder = Path(os.__file__).parent
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    require(
        len(source) > 1_000_000, f"{folder} has {len(source)} bytes of sources. Must have 1 MB."
    )
    return torch.frombuffer(bytearray(source[:4_000_000]), dtype=torch.uint8).long()


def batch(
    data: Tensor, drawn: torch.Generator, size: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - size.context - 1, (size.batch, 1), generator=drawn)
    windows = data[starts + torch.arange(size.context + 1)].to(device)
    return windows[:, :-1], windows[:, 1:]


def trained(
    rank: int,
    world_size: int,
    device: str,
    enabled: bool,
    seconds: float,
    steps: int | None,
    size: Size,
) -> dict[str, Any]:
    """Train for some seconds, or for a number of steps, and return losses and figures."""
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        Model(size).to(where), device_ids=None if where.type == "cpu" else [where.index]
    )
    state = attach(model, quantizer="lloyd4") if enabled else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = text()
    cut = len(data) * 9 // 10
    drawn = torch.Generator().manual_seed(1 + rank)

    def validate() -> float:
        held_out = torch.Generator().manual_seed(99)
        with torch.no_grad():
            losses = [loss_of(*batch(data[cut:], held_out, size, where)) for _ in range(4)]
        return float(torch.stack(losses).mean())

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(model.module(x).flatten(0, 1), y.flatten())

    first, done, start_s = validate(), 0, time.perf_counter()
    while done != steps:
        x, y = batch(data[:cut], drawn, size, where)
        optimizer.zero_grad()
        functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        done += 1
        if steps is None and done % CHECK_EVERY == 0:  # all ranks stop at the same step
            over = torch.tensor(float(time.perf_counter() - start_s > seconds), device=where)
            torch.distributed.all_reduce(over, op=torch.distributed.ReduceOp.MAX)
            if over.item():
                break
    taken_s = time.perf_counter() - start_s
    ratio = state.stats()["ratio"] if state is not None else 1.0
    return {
        "start": first,
        "loss": validate(),
        "steps": done,
        "seconds": taken_s,
        "ratio": ratio,
    }
