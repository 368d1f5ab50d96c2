"""Values that break a naive hook: overflows, changes of the loss scale, extreme ranges, zeros."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effadam_hook import EfficientAdam, EfficientAdamState, attach
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients

TOPOLOGIES = ("rank0", "sharded")
Make = Callable[[int, int], list[Tensor]]


class MaybeUsed(ChosenGradients):
    """Parameters whose gradient is None take no part in the forward."""

    def forward(self, gradients: list[Tensor | None]) -> Tensor:  # type: ignore[override]
        pairs = zip(self.weights, gradients, strict=True)
        return torch.stack([(w * g).sum() for w, g in pairs if g is not None]).sum()


def step_once(model: nn.Module, gradients: Any) -> list[Tensor]:
    model.zero_grad()
    model(gradients).backward()
    return [p.grad.clone() if p.grad is not None else torch.empty(0) for p in model.parameters()]


def residuals_of(state: EfficientAdamState) -> dict[str, Tensor]:
    saved = state.state_dict()
    return {
        f"{side} {name}": value
        for side in ("worker", "server")
        for name, value in saved[side].items()
    }


def all_finite(state: EfficientAdamState) -> bool:
    return all(bool(value.isfinite().all()) for value in residuals_of(state).values())


# Non-finite gradients


def poison(rank: int, world_size: int, topology: str, update: bool) -> list[str]:
    """Every rank in turn poisons one parameter in every bucket; what went wrong, in words."""
    wrong: list[str] = []
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), lr=1e-3) if update else None
    options = {"optimizer": optimizer} if update else {}
    state = attach(model, quantizer="lloyd2", topology=topology, **options)
    for warm in range(2):
        step_once(model, drawn_gradients(rank, warm))
    step = 2
    for bad_rank in range(world_size):
        for p in range(len(SHAPES)):
            value = (torch.nan, torch.inf, -torch.inf)[step % 3]
            gradients = drawn_gradients(rank, step)
            if rank == bad_rank:
                gradients[p].view(-1)[-1] = value
            got = step_once(model, gradients)
            case = f"rank {bad_rank}, parameter {p}, {value}"
            if bool(got[p].isfinite().all()):
                wrong.append(f"{case}: arrived finite")
            if not all(bool(g.isfinite().all()) for i, g in enumerate(got) if i != p):
                wrong.append(f"{case}: spread to other parameters")
            if not all_finite(state):
                wrong.append(f"{case}: poisoned a residual")
            got = step_once(model, drawn_gradients(rank, step))
            if not all(bool(g.isfinite().all()) for g in got):
                wrong.append(f"{case}: was not over with the next step")
            step += 1
    return wrong


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("update", [False, True])
def test_a_non_finite_gradient_reaches_every_rank_and_no_residual(
    topology: str, update: bool
) -> None:
    for wrong in run_ranks(poison, 3, topology, update):
        assert wrong == []


def keep_books(rank: int, world_size: int, topology: str) -> tuple[Tensor, dict[str, Any]]:
    """The sum of what arrived in finite steps, of parameter 0; step 3 is skipped everywhere."""
    model = ddp(ChosenGradients(dtype=torch.float64))
    state = attach(model, quantizer="lloyd2", topology=topology)
    arrived = torch.zeros(SHAPES[0], dtype=torch.float64)
    before_skip: dict[str, Any] = {}
    for step in range(8):
        gradients = drawn_gradients(rank, step, dtype=torch.float64)
        if step == 3:
            before_skip = state.state_dict()
            if rank == 1:
                gradients[3].fill_(torch.inf)
        got = step_once(model, gradients)
        if all(bool(g.isfinite().all()) for g in got):
            arrived += got[0]
        elif step != 3:
            raise AssertionError("only step 3 overflows")
        if step == 3:
            after_skip = state.state_dict()
    return arrived, {"before": before_skip, "after": after_skip, "end": state.state_dict()}


def held(states: list[dict[str, Any]], name: str) -> Tensor:
    """ẽ + (1/N) Σ e_i of one parameter."""
    total = torch.stack([state["worker"][name] for state in states]).mean(dim=0)
    for state in states:
        if name in state["server"]:
            start, share = state["server_start"][name], state["server"][name]
            total[start : start + share.numel()] += share
    return total


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_skipped_step_costs_its_gradient_and_the_change_of_the_residuals(topology: str) -> None:
    ranks = run_ranks(keep_books, 3, topology)
    arrived = ranks[0][0].flatten()
    books = {
        when: held([saved[when] for _, saved in ranks], "weights.0")
        for when in ("before", "after", "end")
    }
    given = [
        sum(drawn_gradients(rank, step, dtype=torch.float64)[0] / 3 for rank in range(3)).flatten()
        for step in range(8)
    ]
    # What DDP in fp32 would have applied, less what the residuals released into the skipped step.
    wanted = sum(g for step, g in enumerate(given) if step != 3) + books["after"] - books["before"]
    assert (arrived + books["end"] - wanted).abs().max() <= 1e-12 * wanted.abs().max()


# Loss scaling


def train_scaled(
    rank: int, world_size: int, init_scale: float | None, follow: bool, overflow: bool
) -> tuple[list[Tensor], list[float], bool]:
    model = ddp(ChosenGradients())
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=init_scale or 1.0, growth_interval=3, enabled=init_scale is not None
    )
    state = attach(model, quantizer="lloyd2", grad_scaler=scaler if follow else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = []
    for step in range(14):
        optimizer.zero_grad()
        loss = model(drawn_gradients(rank, step))
        if overflow and step in (4, 9) and rank == step % world_size:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return [p.detach() for p in model.parameters()], scales, all_finite(state)


def test_residuals_follow_the_loss_scale_to_the_bit() -> None:
    (plain, _, _), _ = run_ranks(train_scaled, 2, None, True, False)
    scaled, scales, _ = run_ranks(train_scaled, 2, 2.0**10, True, False)[0]
    assert len(set(scales)) >= 4
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    naive, _, _ = run_ranks(train_scaled, 2, 2.0**10, False, False)[0]
    assert not all(torch.equal(a, b) for a, b in zip(plain, naive, strict=True))


def test_overflow_steps_are_skipped_on_all_ranks_alike() -> None:
    ranks = run_ranks(train_scaled, 3, 2.0**10, True, True)
    assert min(ranks[0][1]) < 2.0**11
    for weights, scales, finite in ranks:
        assert finite
        assert scales == ranks[0][1]
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][0], strict=True))


def save_scaled(rank: int, world_size: int) -> tuple[float, float]:
    model = ddp(ChosenGradients())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = attach(model, quantizer="lloyd2", grad_scaler=scaler)
    for step in range(3):
        model.zero_grad()
        scaler.scale(model(drawn_gradients(rank, step))).backward()
    saved = state.state_dict()
    norm = torch.cat(list(saved["worker"].values())).norm().item()
    return norm, state.stats()["worker_residual_norm"]


def test_saved_residuals_are_in_unscaled_units() -> None:
    for saved, running in run_ranks(save_scaled, 2):
        assert running == pytest.approx(saved, rel=1e-5)


# Ranges


def extreme(rank: int, world_size: int, dtype: torch.dtype, quantizer: str) -> list[str]:
    wrong = []
    model = ddp(ChosenGradients(dtype=dtype))
    state = attach(model, quantizer=quantizer)
    largest = torch.finfo(dtype).max / 8 if dtype == torch.float16 else 1e38
    sizes = (1.0, largest, 1e-3, 1e-30, 1e-42, 0.0, 1.0)
    for step, size in enumerate(sizes):
        draws = drawn_gradients(rank, step, dtype=torch.float64)
        gradients = [(g / g.abs().max() * size).to(dtype) for g in draws]
        got = step_once(model, gradients)
        if not all(bool(g.isfinite().all()) for g in got):
            wrong.append(f"step {step}, size {size}: result")
        if not all_finite(state):
            wrong.append(f"step {step}, size {size}: residual")
        if any(g.dtype != dtype for g in got):
            wrong.append("dtype")
    return wrong


def pull_for_long(rank: int, world_size: int, dtype: torch.dtype, quantizer: str) -> list[str]:
    wrong = []
    model = ddp(ChosenGradients(dtype=dtype))
    state = attach(model, quantizer=quantizer, topology="sharded")
    draws = drawn_gradients(rank, 0, dtype=torch.float64)
    # The largest element makes errors add up where the others decide the scale.
    gradients = [(g / g.abs().max() * torch.finfo(dtype).max).to(dtype) for g in draws]
    for step in range(25):
        got = step_once(model, gradients)
        if not all(bool(g.isfinite().all()) for g in got) or not all_finite(state):
            wrong.append(f"step {step}")
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["lloyd2", "ternary", "sign"])
def test_gradients_at_the_end_of_float32_stay_finite_for_many_steps(
    dtype: torch.dtype, quantizer: str
) -> None:
    assert run_ranks(pull_for_long, 3, dtype, quantizer) == [[]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["lloyd3", "uniform8", "sign"])
def test_values_of_any_size_stay_finite(dtype: torch.dtype, quantizer: str) -> None:
    for wrong in run_ranks(extreme, 2, dtype, quantizer):
        assert wrong == []


# Parameters and ranks that take no part


def use_some(
    rank: int, world_size: int, topology: str, quantizer: str
) -> tuple[list[Tensor], list[Tensor], dict[str, Any], list[str]]:
    """Parameter 3 is used on every second step, parameter 0 on one rank only."""
    wrong = []
    model = ddp(MaybeUsed(dtype=torch.float64), find_unused_parameters=True)
    up, _, down = quantizer.partition(" up, ")
    state = attach(model, quantizer=up, server_quantizer=down or None, topology=topology)
    arrived = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    given = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for step in range(9):
        gradients: list[Tensor | None] = list(drawn_gradients(rank, step, dtype=torch.float64))
        unused = {3} if step % 2 else set()
        if rank != 1:
            unused.add(0)
        for p in unused:
            gradients[p] = None
        before = residuals_of(state)
        got = step_once(model, gradients)
        after = residuals_of(state)
        for p in unused & {3}:
            for key, value in before.items():
                if key.endswith(f"weights.{p}") and not torch.equal(value, after[key]):
                    wrong.append(f"step {step}: residual {key} of an unused parameter changed")
            if got[p].numel() and bool(got[p].any()):
                wrong.append(f"step {step}: a gradient was made up for parameter {p}")
        for p, grad in enumerate(gradients):
            if grad is not None:
                given[p] += grad
            if got[p].numel():
                arrived[p] += got[p]
    return arrived, given, state.state_dict(), wrong


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("quantizer", ["lloyd3", "sign", "none up, lloyd3"])
def test_unused_parameters_keep_their_residuals(topology: str, quantizer: str) -> None:
    ranks = run_ranks(use_some, 3, topology, quantizer)
    states = [state for _, _, state, _ in ranks]
    for _, _, _, wrong in ranks:
        assert wrong == []
    for p in range(len(SHAPES)):
        given = sum(rank[1][p] for rank in ranks).flatten() / 3
        arrived = ranks[0][0][p].flatten() + held(states, f"weights.{p}")
        assert (arrived - given).abs().max() <= 1e-12 * given.abs().max(), p


def run_out_of_data(
    rank: int, world_size: int, topology: str, quantizer: str
) -> tuple[list[Tensor], list[Tensor], dict[str, Any], list[Tensor]]:
    model = ddp(ChosenGradients(dtype=torch.float64))
    state = attach(model, quantizer=quantizer, topology=topology)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    given = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    own = {}
    with model.join():
        for step in range(3 + 2 * rank):
            gradients = drawn_gradients(rank, step, dtype=torch.float64)
            optimizer.zero_grad()
            model(gradients).backward()
            optimizer.step()
            given = [total + g for total, g in zip(given, gradients, strict=True)]
        own = {k: v.clone() for k, v in state.state_dict()["worker"].items()}
    kept = [own[name] - value for name, value in state.state_dict()["worker"].items()]
    return [p.detach() for p in model.parameters()], given, state.state_dict(), kept


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("quantizer", ["lloyd3", "sign"])
def test_ranks_out_of_data_keep_their_residuals_and_the_books_balance(
    topology: str, quantizer: str
) -> None:
    ranks = run_ranks(run_out_of_data, 3, topology, quantizer)
    states = [state for _, _, state, _ in ranks]
    for weights, _, _, kept in ranks:
        assert all(bool((difference == 0).all()) for difference in kept)
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][0], strict=True))
    for p in range(len(SHAPES)):
        given = sum(rank[1][p] for rank in ranks).flatten() / 3
        arrived = -ranks[0][0][p].flatten() + held(states, f"weights.{p}")
        assert (arrived - given).abs().max() <= 1e-12 * given.abs().max(), p


def zero_rows(rank: int, world_size: int, quantizer: str) -> tuple[float, float]:
    """The largest sum of what arrived where the gradient is always zero, and the largest scale."""
    shape = ((16, 64),)
    model = ddp(ChosenGradients(shape))
    attach(model, quantizer=quantizer)
    total, largest = torch.zeros(shape[0]), 0.0
    for step in range(60):
        (gradient,) = drawn_gradients(rank, step, shape)
        gradient[::2] = 0
        (got,) = step_once(model, [gradient])
        total += got
        largest = max(largest, got.abs().max().item())
    return total[::2].abs().max().item(), largest


@pytest.mark.parametrize("quantizer", ["sign", "lloyd2"])
def test_rows_that_are_always_zero_do_not_drift(quantizer: str) -> None:
    for drift, largest in run_ranks(zero_rows, 2, quantizer):
        assert drift <= 6 * largest


# Accumulation


def accumulate_wrongly(
    rank: int, world_size: int, how: str, ddp_options: dict[str, Any]
) -> list[str]:
    model = ddp(ChosenGradients(), **ddp_options)
    attach(model, quantizer="lloyd4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            if how == "zeros":
                optimizer.zero_grad(set_to_none=False)
            elif how in ("none", "skipped steps"):
                optimizer.zero_grad()
            elif how == "no_sync":
                optimizer.zero_grad()
                with model.no_sync():
                    model(drawn_gradients(rank, 10 + step)).backward()
            model(drawn_gradients(rank, step)).backward()
            if how not in ("no step", "skipped steps"):
                optimizer.step()
            if how == "wrong":
                model(drawn_gradients(rank, 20 + step)).backward()
    own = [w for w in caught if "no_sync" in str(w.message)]
    assert all(w.filename == __file__ for w in own)  # not torch's line, which called the hook
    return [str(w.message) for w in own]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02}], ids=["own", "views"]
)
@pytest.mark.parametrize(
    ("how", "warned"),
    [("wrong", 1), ("no step", 1), ("zeros", 0), ("none", 0), ("no_sync", 0), ("skipped steps", 0)],
)
def test_accumulation_without_no_sync_is_warned_of_once(
    how: str, warned: int, options: dict[str, Any]
) -> None:
    for messages in run_ranks(accumulate_wrongly, 2, how, options):
        assert len(messages) == warned


def skip_a_step_and_a_parameter(rank: int, world_size: int) -> list[str]:
    model = ddp(Heads(), find_unused_parameters=True)
    attach(model, quantizer="lloyd4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            optimizer.zero_grad(set_to_none=False)
            model(torch.ones(3, 4), head=(step + rank) % 2).sum().backward()
            if step % 3:  # as GradScaler skips one
                optimizer.step()
    return [str(w.message) for w in caught if "no_sync" in str(w.message)]


class Heads(torch.nn.Module):
    """Two heads, of which a forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 300, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, head: int) -> torch.Tensor:
        return self.heads[head](x)


def test_gradients_filled_with_zeros_are_not_taken_for_accumulation() -> None:
    assert run_ranks(skip_a_step_and_a_parameter, 2) == [[], []]


def test_skipped_steps_of_a_model_of_one_bucket_are_not_taken_for_accumulation() -> None:
    options = {"gradient_as_bucket_view": True, "bucket_cap_mb": 25}
    for messages in run_ranks(accumulate_wrongly, 2, "skipped steps", options):
        assert messages == []
