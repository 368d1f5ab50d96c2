"""Statistics of a state, and its descriptions as text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from effadam_hook import EfficientAdam, attach
from effadam_hook.wire.counters import human_bytes
from harness import run_ranks
from training import ChosenGradients, ddp, drawn_gradients


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_600, "1.00 MB"),
        (193_817_568, "194 MB"),
        (1_498_316_800, "1.50 GB"),
        (7e18, "7000 PB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: float, text: str) -> None:
    assert human_bytes(count) == text


def train_scaled(rank: int, world_size: int, scales: list[float]) -> list[dict[str, float]]:
    model = ddp(ChosenGradients())
    scaler = torch.amp.GradScaler("cpu", init_scale=scales[0])
    state = attach(model, quantizer="lloyd2", topology="sharded", grad_scaler=scaler)
    rows = []
    for step, scale in enumerate(scales):
        scaler.scale(torch.ones(()))  # creates its tensors
        scaler.update(scale)
        model.zero_grad()
        scaler.scale(model(drawn_gradients(rank, step))).backward()
        rows.append(state.stats())
    return rows


def test_a_change_of_the_loss_scale_leaves_no_trace_in_the_statistics() -> None:
    names = ("worker_residual_norm", "server_residual_norm", "quantization_error")
    plain = run_ranks(train_scaled, 2, [1.0] * 5)
    scaled = run_ranks(train_scaled, 2, [2.0**16, 2.0**16, 2.0**3, 2.0**3, 2.0**12])
    for expected, got in zip(plain, scaled, strict=True):
        for one, other in zip(expected, got, strict=True):
            for name in names:
                assert other[name] == pytest.approx(one[name], rel=1e-5), name


def measure_error(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd3", topology="sharded")
    measured, expected = [state.stats()["quantization_error"]], [0.0]
    for step in range(4):
        model.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        result = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
        for parameter in model.parameters():  # as gradient clipping does
            parameter.grad.mul_(1e-3)
        stats = state.stats()
        measured.append(stats["quantization_error"])
        expected.append(stats["worker_residual_norm"] / float(result))
    return measured, expected


def test_the_quantization_error_is_relative_to_the_exchanged_mean() -> None:
    for measured, expected in run_ranks(measure_error, 2):
        assert measured == pytest.approx(expected, rel=1e-5)
        assert all(0.01 < error < 1 for error in measured[1:])


def describe_runs(rank: int, world_size: int) -> dict[str, Any]:
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd4", topology="rank0", enabled=False)
    found: dict[str, Any] = {"new": state.summary()}
    model(drawn_gradients(rank, 0)).backward()
    found["off"] = state.summary()
    state.enabled = True
    model(drawn_gradients(rank, 1)).backward()
    found["on"], found["repr"] = state.summary(), repr(state)
    found["copy"] = repr(copy.deepcopy(state))
    small = ddp(nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40)))
    with pytest.warns(UserWarning, match="replaces the default"):
        patterns = attach(small, exact=("1.weight",))
    small(torch.ones(2, 40)).sum().backward()
    found["patterns"] = patterns.summary()
    return found


def test_summaries_have_human_units_and_no_line_without_a_meaning() -> None:
    (found,) = run_ranks(describe_runs, 1)
    assert found["new"].splitlines()[1:] == []
    assert found["new"].endswith(": off (dense all-reduce)")
    off = {line.split()[0]: line for line in found["off"].splitlines()[1:]}
    assert list(off) == ["steps", "bytes", "exchange"]
    assert "72.2 kB a rank, uncompressed" in off["bytes"]
    on = {line.split()[0]: line for line in found["on"].splitlines()[1:]}
    assert " -> " in on["bytes"] and on["bytes"].endswith("x less")
    assert "times the last result" in on["residuals"]
    assert "% of the elements" in on["exact"] and "quantized" not in on["exact"]
    assert found["repr"].startswith("<EfficientAdamState on: gradient, lloyd4, rank0; 2 steps, ")
    assert found["copy"].startswith("<EfficientAdamState a copy, registered with no model")
    assert 'without rule "1d", 2 of one dimension are quantized' in found["patterns"]


def test_the_optimizer_shows_the_options_that_are_set() -> None:
    parameters = [nn.Parameter(torch.zeros(3))]
    shown = repr(EfficientAdam(parameters, lr=0.5, second_moment="shared", max_grad_norm=2.0))
    assert "lr: 0.5" in shown and "second_moment: shared" in shown and "max_grad_norm: 2.0" in shown
