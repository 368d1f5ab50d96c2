"""Checkpoints of a data-parallel run with error feedback, one file for all ranks.

Weights and optimizer are equal on all workers, residuals are not: without the residuals of every rank,
a resumed run would differ from an uninterrupted one. The file is replaced atomically, so it is complete
even if the run is killed. It contains tensors and plain values only, so `torch.load` reads it with
`weights_only=True`.
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

_IRRELEVANT = {  # options that do not affect the training steps
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
    """Return the settings that a resumed run must share with the saved run, as JSON."""
    settings = {name: value for name, value in asdict(options).items() if name not in _IRRELEVANT}
    return json.dumps(settings | task_options, sort_keys=True, default=str)


def mismatch(path: Path, settings: str) -> str | None:
    """Return the reason why a checkpoint cannot be resumed with these settings; None if it can."""
    try:
        saved = json.loads(torch.load(path, map_location="cpu", weights_only=True)["settings"])
    except (EOFError, KeyError, TypeError, RuntimeError, ValueError, UnpicklingError):
        return f"{path} is not a checkpoint of this program"
    given = json.loads(settings)
    differences = [
        f"{name} (was {saved.get(name)}, now {given.get(name)})"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
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
    """Write a checkpoint; every worker must call this at the same step.

    Args:
        path: The file.
        worker: This worker.
        settings: Settings from `fingerprint`.
        points: The curve up to this step, which its last point contains.
        model: The module inside DDP.
        optimizer: The optimizer.
        state: Exchange state of this worker; None in a dense run.
    """
    exchange = state.full_state_dict() if state else None  # gathered on rank 0
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
    """Restore a checkpoint on every worker, and return the curve up to its step."""
    content = torch.load(path, map_location=worker.device, weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if state is not None:
        state.load_state_dict(content["exchange"])
    points: list[dict[str, Any]] = content["points"]
    return points
