"""Nothing of the package follows ``torch.set_default_device``: tensors go where the parameters are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effadam_hook import EfficientAdam, attach
from harness import run_ranks
from training import ChosenGradients, ddp, drawn_gradients

STEPS = 4

MODES: dict[str, dict[str, Any]] = {
    "gradient": {"quantizer": "lloyd4", "topology": "sharded"},
    "no error feedback": {"quantizer": "uniform8", "error_feedback": False},
    "dense first": {"quantizer": "sign", "warmup_steps": 1},
    "chosen topology": {"topology": "auto"},
    "chosen method": {"auto": True},
    "loss scaling": {"grad_scaler": "made on the rank"},
    "preconditioned": {"precondition": True},
    "update": {"topology": "sharded"},
    "update, shared": {"optimizer_options": {"second_moment": "shared", "refresh_every": 2}},
    "update, frozen": {"optimizer_options": {"second_moment": "frozen"}, "warmup_steps": 1},
    "update, clipped": {"optimizer_options": {"max_grad_norm": 1.0}},
    "weights": {"quantize_weights": True},
}


def train(
    rank: int, world_size: int, mode: str, dtype: torch.dtype, device: str | None
) -> list[Tensor]:
    model = ddp(ChosenGradients(dtype=dtype))
    options = dict(MODES[mode])
    gradients = [drawn_gradients(rank, step, dtype=dtype) for step in range(STEPS)]
    torch.set_default_device(device)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if mode.startswith(("update", "weights")):
        chosen = options.pop("optimizer_options", {})
        options["optimizer"] = optimizer = EfficientAdam(model.parameters(), lr=1e-3, **chosen)
    if mode == "preconditioned":
        options["optimizer"] = optimizer
    if mode == "loss scaling":
        options["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=False)
    state = attach(model, **options)
    for chosen_gradients in gradients:
        optimizer.zero_grad()
        model(chosen_gradients).backward()
        optimizer.step()
        state.stats()
    own, whole = state.state_dict(), state.full_state_dict()
    state.load_state_dict(own)
    if rank == 0:
        state.load_state_dict(whole)
    state.summary()
    state.close()
    torch.set_default_device(None)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_alike_under_another_default_device(
    mode: str, dtype: torch.dtype
) -> None:
    under_meta = run_ranks(train, 3, mode, dtype, "meta")
    plain = run_ranks(train, 3, mode, dtype, None)
    for here, there in zip(under_meta, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
