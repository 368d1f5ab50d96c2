"""Residuals in torch.distributed.checkpoint: saved by three workers, loaded by two.

    python examples/checkpoint_dcp.py

Every rank writes its own state, in parallel, as one tensor of bytes beside model and optimizer. Loading
reads the number of saved states from the checkpoint's metadata. The workers' mean residual and the
servers' residuals, which error feedback has yet to apply to the weights, are preserved.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from common.launch import Worker, launch
from common.training import cross_entropy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from train_digits import Digits, DigitsOptions

from effadam_hook import EfficientAdamState, attach

KEY = "exchange.rank"


def save(path: Path, model: Any, optimizer: Any, state: EfficientAdamState, rank: int) -> None:
    """Write a checkpoint; every rank must call this."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, f"{KEY}{rank}": to_bytes(state.state_dict())}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(path, overwrite=True))


def load(path: Path, model: Any, optimizer: Any, state: EfficientAdamState) -> None:
    """Read a checkpoint written by any number of ranks; every rank must call this."""
    weights, moments = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": moments}
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    keys = sorted(
        (key for key in metadata if key.startswith(KEY)), key=lambda key: int(key[len(KEY) :])
    )
    for key in keys:
        content[key] = torch.empty(metadata[key].size, dtype=torch.uint8)
    dcp.load(content, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=content["optimizer"]
    )
    ranks = [from_bytes(content[key]) for key in keys]
    state.load_state_dict({"version": ranks[0]["version"], "ranks": ranks})


def to_bytes(saved: dict[str, Any]) -> Tensor:
    """Convert a saved state to a tensor."""
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def from_bytes(data: Tensor) -> dict[str, Any]:
    """Convert a tensor to a saved state."""
    saved: dict[str, Any] = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    return saved


def train(worker: Worker, path: Path, first: int, last: int) -> None:
    """Train for some steps, from a checkpoint if ``first`` is not 0, and write a checkpoint."""
    torch.manual_seed(0)
    task = Digits(DigitsOptions(width=8))
    model = DistributedDataParallel(task.build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    state = attach(model, quantizer="lloyd2")
    if first:
        load(path, model, optimizer, state)
        report(worker, state, "loaded")
    for step in range(first, last):
        inputs, targets = task.sample(np.random.default_rng([step, worker.rank]), 16)
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report(worker, state, "trained")
    save(path, model, optimizer, state, worker.rank)


def report(worker: Worker, state: EfficientAdamState, event: str) -> None:
    """Print the norm of the workers' mean residual of one parameter; every rank must call this."""
    whole = state.full_state_dict()
    if worker.is_main:
        residuals = [saved["worker"]["2.weight"] for saved in whole["ranks"]]
        norm = torch.stack(residuals).mean(0).norm().item()
        workers = f"{worker.world_size} workers"
        print(f"{workers}, {event}, step {state.steps}: mean residual {norm:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/checkpoint_dcp"))
    path = parser.parse_args().checkpoint
    launch(train, 3, "cpu", path, 0, 60)
    launch(train, 2, "cpu", path, 60, 120)


if __name__ == "__main__":
    main()
