"""Update mode under join(): a rank out of data goes on by momentum, and steps with the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effadam_hook import EfficientAdam, attach
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients

F64 = torch.float64
BATCHES = (4, 9, 6)
"""Of each rank, before it is out of data."""


def run_out(
    rank: int, world_size: int, options: dict[str, Any], settings: dict[str, Any]
) -> list[Any]:
    """Two epochs under join(), both of ranks that run out at different times."""
    model = ddp(ChosenGradients(dtype=F64))
    optimizer = EfficientAdam(model.parameters(), lr=0.01, weight_decay=0.1, **settings)
    state = attach(model, optimizer=optimizer, **options)
    epochs = []
    for epoch in range(2):
        with model.join():
            for step in range(BATCHES[(rank + epoch) % world_size]):
                model.zero_grad()
                model(drawn_gradients(rank, step, dtype=F64)).backward()
                optimizer.step()
                last = [p.detach().clone() for p in model.parameters()]
        weights = [p.detach().clone() for p in model.parameters()]
        moments = optimizer.state[next(iter(model.parameters()))]
        epochs.append((last, weights, int(moments["step"]), state.state_dict()))
    return epochs


@pytest.mark.parametrize(
    "options",
    [
        {"quantizer": "lloyd2"},
        {"quantizer": "lloyd2", "topology": "sharded", "warmup_steps": 7},
        {"quantize_weights": True, "server_quantizer": "uniform8", "topology": "sharded"},
        {"quantize_weights": True, "server_quantizer": "uniform8", "warmup_steps": 2},
    ],
)
@pytest.mark.parametrize("second_moment", ["local", "shared"])
def test_ranks_out_of_data_step_with_the_others(
    options: dict[str, Any], second_moment: str
) -> None:
    settings = {"second_moment": second_moment, "refresh_every": 3}
    ranks = run_ranks(run_out, 3, options, settings)
    for epoch in range(2):
        longest = max(range(3), key=lambda rank: BATCHES[(rank + epoch) % 3])
        last = ranks[longest][epoch][0]
        for rank in ranks:
            _, weights, step, _ = rank[epoch]
            assert all(torch.equal(a, b) for a, b in zip(weights, last, strict=True))
            assert step == 9 * (epoch + 1)


def local_updates(world_size: int) -> list[Tensor]:
    """Minus the sum of the workers' mean updates over one epoch, zero gradients included."""
    total = [torch.zeros(s, dtype=F64) for s in SHAPES]
    for rank in range(world_size):
        first = [torch.zeros(s, dtype=F64) for s in SHAPES]
        second = [torch.zeros(s, dtype=F64) for s in SHAPES]
        for step in range(max(BATCHES)):
            drawn = drawn_gradients(rank, step, dtype=F64)
            for p, shape in enumerate(SHAPES):
                g = drawn[p] if step < BATCHES[rank] else torch.zeros(shape, dtype=F64)
                first[p] = 0.9 * first[p] + 0.1 * g
                second[p] = 0.999 * second[p] + 0.001 * g * g
                root = (second[p] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                total[p] -= 0.01 * first[p] / (1 - 0.9 ** (step + 1)) / root / world_size
    return total


def keep_books(rank: int, world_size: int, topology: str) -> tuple[list[Tensor], dict[str, Any]]:
    model = ddp(ChosenGradients(dtype=F64))
    optimizer = EfficientAdam(model.parameters(), lr=0.01, second_moment="local")
    state = attach(model, optimizer=optimizer, quantizer="lloyd2", topology=topology)
    with model.join():
        for step in range(BATCHES[rank]):
            model.zero_grad()
            model(drawn_gradients(rank, step, dtype=F64)).backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], state.state_dict()


@pytest.mark.parametrize("topology", ["rank0", "sharded"])
def test_the_virtual_iterate_follows_the_mean_update_of_all_ranks(topology: str) -> None:
    ranks = run_ranks(keep_books, 3, topology)
    for p, expected in enumerate(local_updates(3)):
        virtual = ranks[0][0][p].flatten().clone()
        for _, saved in ranks:
            virtual -= saved["worker"][f"weights.{p}"] / 3
            if f"weights.{p}" in saved["server"]:
                share = saved["server"][f"weights.{p}"]
                start = saved["server_start"][f"weights.{p}"]
                virtual[start : start + share.numel()] -= share
        error = (virtual.view_as(expected) - expected).abs().max()
        assert error <= 1e-12 * max(1.0, float(expected.abs().max()))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.extra = nn.Linear(23, 23), nn.Linear(23, 23)

    def forward(self, batch: Tensor, use_extra: bool) -> Tensor:
        out = torch.tanh(self.trunk(batch))
        return self.extra(out) if use_extra else out


def adamw_under_join(rank: int, world_size: int, finds_unused: bool) -> float:
    """The distance from AdamW on the rank with the most data."""
    torch.manual_seed(0)
    ours, theirs = Halves(), Halves()
    theirs.load_state_dict(ours.state_dict())
    models = [ddp(m, find_unused_parameters=finds_unused) for m in (ours, theirs)]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = EfficientAdam(
        models[0].parameters(), second_moment="shared", refresh_every=1, **settings
    )
    attach(models[0], optimizer=optimizer, quantizer="none", topology="sharded")
    reference = torch.optim.AdamW(models[1].parameters(), **settings)
    worst = 0.0
    for model, opt in zip(models, (optimizer, reference), strict=True):
        with model.join():
            for step in range(BATCHES[rank]):
                generator = torch.Generator().manual_seed(100 * step + rank)
                opt.zero_grad()
                model(torch.randn(5, 23, generator=generator), True).square().mean().backward()
                opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        worst = max(worst, float((a - b).abs().max()))
    return worst


@pytest.mark.parametrize("finds_unused", [False, True])
def test_a_shared_second_moment_makes_it_adamw(finds_unused: bool) -> None:
    assert max(run_ranks(adamw_under_join, 3, finds_unused)) <= 1e-5


def unused_under_join(rank: int, world_size: int) -> tuple[list[Tensor], int]:
    """The weights, and the steps of a part that is used in every third step only."""
    torch.manual_seed(0)
    inner = Halves().double()
    model = ddp(inner, find_unused_parameters=True)
    optimizer = EfficientAdam(model.parameters(), lr=0.01, second_moment="shared", refresh_every=2)
    attach(model, optimizer=optimizer, quantizer="lloyd2")
    with model.join():
        for step in range(BATCHES[rank]):
            generator = torch.Generator().manual_seed(100 * step + rank)
            model.zero_grad()
            batch = torch.randn(5, 23, generator=generator, dtype=F64)
            model(batch, step % 3 == 2).square().mean().backward()
            optimizer.step()
    weights = [p.detach().clone() for p in inner.parameters()]
    return weights, optimizer.state[inner.extra.weight]["step"]


def test_all_parameters_are_stepped_alike_where_ranks_cannot_know_which_are_unused() -> None:
    ranks = run_ranks(unused_under_join, 3)
    for weights, step in ranks:
        assert step == max(BATCHES)
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][0], strict=True))
