"""Train a small GPT on source code, dense and compressed, for the same number of steps."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach
from gpu_check.outcome import Checks, Context, require
from harness import run_ranks

__all__ = ["run"]

CONTEXT, WIDTH, LAYERS, BATCH = 128, 256, 4, 32
STARTUP_S = 20.0
# In nats a byte; the runs differ by about .01 between seeds.
LARGEST_DIFFERENCE = 0.05


def run(context: Context) -> Checks:
    """Compare the validation loss of 4 bits with that of a dense run, on two ranks."""
    checks = Checks()
    checks.run("lloyd4 against dense", lambda: compare(context))
    return checks


def compare(context: Context) -> str:
    several = context.device == "cuda" and torch.cuda.device_count() > 1
    backend = "nccl" if several else "gloo"
    half_s, start_s = context.seconds / 2, time.monotonic()
    train_s = max(2.0, half_s - STARTUP_S)

    def train(enabled: bool, steps: int | None, limit_s: float) -> dict[str, Any]:
        arguments = (context.device, enabled, train_s, steps)
        results = run_ranks(trained, 2, *arguments, timeout=limit_s, backend=backend, fresh=True)
        found: dict[str, Any] = results[0]
        return found

    dense = train(False, None, 1.4 * half_s)
    steps = dense["steps"]
    ours = train(True, steps, 1.5 * context.seconds - (time.monotonic() - start_s))
    detail = (
        f"validation loss {ours['loss']:.4f}, dense {dense['loss']:.4f} after {steps} steps over "
        f"{backend}; {ours['seconds']:.0f} s, dense {dense['seconds']:.0f} s; "
        f"{ours['ratio']:.1f} times fewer bytes"
    )
    learned = dense["start"] - dense["loss"]
    allowed = max(LARGEST_DIFFERENCE, 0.1 * learned)
    require(ours["loss"] - dense["loss"] < allowed, detail + f". Must be within {allowed:.3f}")
    return detail


class Model(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

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
    return torch.frombuffer(bytearray(source[:4_000_000]), dtype=torch.uint8).long()


def batch(data: Tensor, drawn: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=drawn)
    windows = data[starts + torch.arange(CONTEXT + 1)].to(device)
    return windows[:, :-1], windows[:, 1:]


def trained(
    rank: int, world_size: int, device: str, enabled: bool, seconds: float, steps: int | None
) -> dict[str, Any]:
    """Train for some seconds, or for a number of steps, and return losses and figures."""
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        Model().to(where), device_ids=None if where.type == "cpu" else [where.index]
    )
    state = attach(model, quantizer="lloyd4") if enabled else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = text()
    cut = len(data) * 9 // 10
    drawn = torch.Generator().manual_seed(1 + rank)

    def validate() -> float:
        held_out = torch.Generator().manual_seed(99)
        with torch.no_grad():
            losses = [loss_of(*batch(data[cut:], held_out, where)) for _ in range(4)]
        return float(torch.stack(losses).mean())

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(model.module(x).flatten(0, 1), y.flatten())

    first, done, start_s = validate(), 0, time.perf_counter()
    while True:
        x, y = batch(data[:cut], drawn, where)
        optimizer.zero_grad()
        functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        done += 1
        over = torch.tensor(float(time.perf_counter() - start_s > seconds), device=where)
        if steps is None and done % 5 == 0:  # all ranks stop at the same step
            torch.distributed.all_reduce(over, op=torch.distributed.ReduceOp.MAX)
            if over.item():
                break
        if steps is not None and done == steps:
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
