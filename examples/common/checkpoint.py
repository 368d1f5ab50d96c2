"""Checkpoints of a data-parallel run with error feedback, one file for all ranks.

Weights and optimizer are the same on all workers, residuals are not: without every rank's residuals
a resumed run would take other steps than an uninterrupted one. The file is replaced atomically, so
it is complete whenever the run is killed, and it holds tensors and plain values only: `torch.load`
reads it with `weights_only=True`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .launch import Worker
from .options import Options

if TYPE_CHECKING:
    from effadam_hook import EfficientAdamState

_IRRELEVANT = {  # options that do not change the steps a run takes
    "device",
    "validate_every",
    "stop_after",
    "checkpoint",
    "resume",
    "plot",
    "json",
    "csv",
    "log",
}


def fingerprint(options: Options, **task_options: Any) -> str:
    """What a resumed run must have in common with the one that wrote the checkpoint, as JSON."""
    settings = {name: value for name, value in asdict(options).items() if name not in _IRRELEVANT}
    return json.dumps(settings | task_options, sort_keys=True, default=str)


def complaint(path: Path, settings: str) -> str | None:
    """Why the checkpoint at `path` cannot be resumed with these settings; None if it can."""
    try:
        then = json.loads(torch.load(path, map_location="cpu", weights_only=True)["settings"])
    except (EOFError, KeyError, TypeError, RuntimeError, ValueError, UnpicklingError):
        return f"{path} is not a checkpoint of this program"
    now = json.loads(settings)
    differences = [
        f"{name} (was {then.get(name)}, now {now.get(name)})"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        return f"{path} was written by a run with other options: {', '.join(differences)}"
    return None


def save(
    path: Path,
    worker: Worker,
    settings: str,
    points: list[dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: EfficientAdamState | None,
) -> None:
    """Write a checkpoint; called by all workers at the same step.

    Args:
        path: the file.
        worker: who we are.
        settings: see `fingerprint`.
        points: the curve so far; its last point names the step.
        model: the module inside DDP.
        optimizer: its optimizer.
        state: this worker's exchange state; None in a dense run.
    """
    exchange = state.full_state_dict() if state else None  # collects all ranks' on rank 0
    if not worker.is_main:
        return
    content = {
        "settings": settings,
        "points": points,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "exchange": exchange,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    torch.save(content, unfinished)
    unfinished.replace(path)


def load(
    path: Path,
    worker: Worker,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: EfficientAdamState | None,
) -> list[dict[str, Any]]:
    """Restore what `save` wrote, on every worker; returns the curve so far."""
    content = torch.load(path, map_location=worker.device, weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if state is not None:
        state.load_state_dict(content["exchange"])
    points: list[dict[str, Any]] = content["points"]
    return points
