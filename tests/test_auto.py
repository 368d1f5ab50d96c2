"""Choosing by measurement whether to compress at all."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from effadam_hook import EfficientAdam, attach
from effadam_hook.ddp.auto_compress import AutoCompress
from effadam_hook.session.buffers import BucketBuffers
from harness import run_ranks
from training import ChosenGradients, ddp, gradients_of

STEPS = 16
"""That a auto_compress takes, warm-up aside."""


def test_a_trial_times_dense_steps_and_then_compressed_ones() -> None:
    auto_compress = AutoCompress()
    now, compressed = 0.0, []
    while not auto_compress.is_complete:
        auto_compress.begin_step(now)
        if not auto_compress.is_complete:
            compressed.append(auto_compress.compresses)
            # The first of each kind are slow, and do not count.
            first = compressed.count(compressed[-1]) <= 3
            now += 9.0 if first else 1.0 + compressed[-1]
    assert compressed == [False] * 8 + [True] * 8
    assert auto_compress.medians_s() == (1.0, 2.0)
    assert auto_compress.pays is None and auto_compress.outcome == "being measured"


@pytest.mark.parametrize(
    ("dense_s", "compressed_s", "pays"), [(0.1, 0.05, True), (0.1, 0.099, False), (0.1, 0.2, False)]
)
def test_a_trial_keeps_dense_steps_unless_compressed_ones_are_clearly_faster(
    dense_s: float, compressed_s: float, pays: bool
) -> None:
    auto_compress = AutoCompress()
    auto_compress.decide(dense_s, compressed_s)
    assert auto_compress.pays is pays and auto_compress.is_over
    assert "a step takes 100.0 ms dense" in auto_compress.outcome


def slow_down_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BucketBuffers.encode

    def encode(plan: BucketBuffers) -> None:
        time.sleep(0.06)
        original(plan)

    monkeypatch.setattr(BucketBuffers, "encode", encode)


def try_out(
    rank: int, world_size: int, slow: str, warmup: int, options: dict[str, Any]
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if slow == "compressed" and rank == 1:
            slow_down_compression(monkeypatch)
        model = ddp(ChosenGradients(dtype=torch.float64))
        state = attach(model, auto=True, warmup_steps=warmup, quantizer="lloyd2", **options)
        bytes_sent = []
        for step in range(warmup + STEPS + 4):
            if slow == "dense" and rank == 1 and step < warmup + 8:
                time.sleep(0.06)
            before = state.stats()["uplink_bytes"]
            gradients_of(model, rank, step)
            sent = state.stats()["uplink_bytes"] - before
            dense = sum(p.numel() * 8 for p in model.parameters())
            bytes_sent.append("dense" if sent == dense else "compressed")
        state.close()
    return {
        "kinds": bytes_sent,
        "enabled": state.enabled,
        "summary": state.summary(),
    }


@pytest.mark.parametrize("topology", ["rank0", "sharded"])
def test_where_compression_is_slower_dense_steps_stay(topology: str) -> None:
    for result in run_ranks(try_out, 3, "compressed", 2, {"topology": topology}):
        assert result["kinds"] == ["dense"] * 10 + ["compressed"] * 8 + ["dense"] * 4
        assert result["enabled"] is False
        assert "  auto         dense: a step takes" in result["summary"]


def test_where_compression_is_faster_it_stays() -> None:
    for result in run_ranks(try_out, 2, "dense", 0, {}):
        assert result["kinds"] == ["dense"] * 8 + ["compressed"] * 12
        assert result["enabled"] is True
        assert "  auto         compressed: a step takes" in result["summary"]


def decide_oneself(rank: int, world_size: int, choice: bool) -> tuple[bool, str, float]:
    model = ddp(ChosenGradients())
    state = attach(model, auto=True, quantizer="lloyd2")
    for step in range(STEPS + 4):
        if step == 3:
            state.enabled = choice
        gradients_of(model, rank, step)
    return state.enabled, state.summary(), state.stats()["ratio"]


@pytest.mark.parametrize("choice", [False, True])
def test_setting_enabled_ends_a_trial_and_holds(choice: bool) -> None:
    for enabled, summary, ratio in run_ranks(decide_oneself, 2, choice):
        assert enabled is choice
        assert "auto         ended without a decision, as enabled was set" in summary
        assert (ratio > 2) == choice


def try_out_updates(rank: int, world_size: int) -> list[list[Tensor]]:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), lr=1e-2)
    attach(model, auto=True, optimizer=optimizer, quantizer="lloyd2")
    weights = []
    for step in range(STEPS + 3):
        gradients_of(model, rank, step)
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    return weights


def test_replicas_stay_equal_when_updates_are_tried_out() -> None:
    first, second = run_ranks(try_out_updates, 2)
    for here, there in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def refuse(rank: int, world_size: int) -> None:
    model = ddp(ChosenGradients())
    with pytest.raises(ValueError, match=r"Invalid enabled: False with auto=True.*auto decides"):
        attach(model, auto=True, enabled=False)
    optimizer = EfficientAdam(model.parameters())
    with pytest.raises(ValueError, match="Invalid auto: True with quantize_weights=True"):
        attach(model, auto=True, optimizer=optimizer, quantize_weights=True)


def test_auto_is_refused_where_it_contradicts() -> None:
    run_ranks(refuse, 1)
