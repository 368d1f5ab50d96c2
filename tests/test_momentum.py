"""Momentum for few bits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from effadam_hook import attach, reduced_betas
from harness import run_ranks
from training import ddp


@pytest.mark.parametrize(
    ("quantizers", "beta1"),
    [(("none",), 0.9), (("lloyd4",), 0.88), (("lloyd2",), 0.7), (("sign",), 0.36)],
)
def test_fewer_bits_get_less_momentum(quantizers: tuple[str, ...], beta1: float) -> None:
    assert reduced_betas((0.9, 0.99), *quantizers) == (beta1, 0.99)


def test_rounding_never_adds_momentum() -> None:
    assert reduced_betas((0.999, 0.999), "none") == (0.999, 0.999)
    assert reduced_betas((0.9954, 0.999), "none") == (0.9954, 0.999)
    assert reduced_betas(torch.tensor([0.995, 0.5]), "uniform8") == (0.993, 0.5)  # type: ignore[arg-type]


def test_both_directions_count() -> None:
    up, down = reduced_betas((0.9, 0.999), "sign", "none"), reduced_betas((0.9, 0.999), "sign")
    assert up[0] == pytest.approx(0.9 * 2 / torch.pi, abs=0.01)
    assert down[0] == pytest.approx(0.9 * (2 / torch.pi) ** 2, abs=0.01)
    assert reduced_betas((0.9, 0.999), "none", "sign") == up


def test_what_are_no_betas_or_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid betas: \(1\.0, 0\.9\)\. The first must be in"):
        reduced_betas((1.0, 0.9), "sign")
    for betas in ((0.9,), (0.9, 0.99, 0.999), 0.9, None, "ab"):
        with pytest.raises(TypeError, match=r"Invalid betas: .* Must be two numbers"):
            reduced_betas(betas, "sign")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid quantizer: 'loyd2'"):
        reduced_betas((0.9, 0.9), "loyd2")
    with pytest.raises(ValueError, match="Invalid quantizer: 'loyd2'"):
        reduced_betas((0.9, 0.9), "sign", "loyd2")


def messages(
    rank: int,
    world_size: int,
    quantizer: str,
    betas: tuple[float, float],
    precondition: bool,
    options: dict[str, Any],
    enables: bool = False,
) -> list[tuple[str, str]]:
    """Return the warnings of a training of three steps, and the files to which they point."""
    torch.manual_seed(0)
    model = ddp(nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=betas)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = attach(
            model,
            optimizer=optimizer if precondition else None,
            precondition=precondition,
            quantizer=quantizer,
            **options,
        )
        if enables:
            state.enabled = True
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 9)).sum().backward()
            optimizer.step()
    return [(str(each.message), each.filename) for each in caught]


@pytest.mark.parametrize("enabled", [True, False])
def test_more_momentum_than_few_bits_allow_is_announced_once_compression_begins(
    enabled: bool,
) -> None:
    arguments = "lloyd2", (0.9, 0.999), True, {"enabled": enabled}, True
    for ((message, file),) in run_ranks(messages, 2, *arguments):
        assert file == __file__
        assert message.startswith("betas=(0.9, 0.999) is much momentum for so few bits")
        assert "Use effadam_hook.reduced_betas, which makes 0.7 of 0.9" in message


@pytest.mark.parametrize(
    ("quantizer", "betas", "precondition", "options"),
    [
        ("lloyd3", (0.9, 0.999), True, {}),
        ("sign", reduced_betas((0.9, 0.999), "sign"), True, {}),
        ("sign", (0.9, 0.999), False, {}),  # the optimizer is not known
        ("sign", (0.9, 0.999), True, {"enabled": False}),
        ("sign", (0.9, 0.999), True, {"error_feedback": False}),
    ],
)
def test_little_momentum_is_no_reason_for_a_warning(
    quantizer: str, betas: tuple[float, float], precondition: bool, options: dict[str, Any]
) -> None:
    assert run_ranks(messages, 2, quantizer, betas, precondition, options) == [[], []]
