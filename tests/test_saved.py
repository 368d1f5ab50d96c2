"""Residuals survive changes of the layout, and a resume: to the bit, or in the mean on other ranks."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effadam_hook import (
    EffAdamError,
    EfficientAdamState,
    StateMismatchError,
    attach,
    efficient_adam_hook,
)
from effadam_hook.feedback.checksum import with_checksum
from effadam_hook.feedback.residuals import Place, Residuals
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients, loss_of

TOPOLOGIES = ("rank0", "sharded")
CPU = torch.device("cpu")


def test_residuals_move_with_their_parameters_when_buckets_change() -> None:
    residuals = Residuals()
    one = residuals.adopt([Place("a", 0, 3), Place("b", 3, 2)], 5, torch.float32, CPU)
    one.copy_(torch.arange(5.0))
    second = residuals.adopt([Place("b", 1, 2), Place("new", 0, 1)], 3, torch.float32, CPU)
    first = residuals.adopt([Place("a", 0, 3)], 3, torch.float32, CPU)
    assert second.tolist() == [0.0, 3.0, 4.0]
    assert first.tolist() == [0.0, 1.0, 2.0]
    second += 1
    assert dict(residuals)["b"].tolist() == [4.0, 5.0]
    assert residuals.norm() == pytest.approx((0 + 1 + 4 + 16 + 25 + 1) ** 0.5)


def test_a_residual_of_another_size_is_refused() -> None:
    residuals = Residuals()
    residuals.adopt([Place("a", 0, 3)], 3, torch.float32, CPU).fill_(1)
    found = r"'a' is that of 3 elements from element 0 on\. Must be that of 4 from 0 on"
    with pytest.raises(StateMismatchError, match=found):
        residuals.adopt([Place("a", 0, 4)], 4, torch.float32, CPU)
    with pytest.raises(StateMismatchError, match=r"Must be that of 3 from 5 on"):
        residuals.adopt([Place("a", 0, 3, offset=5)], 3, torch.float32, CPU)
    residuals.load({}, CPU)  # without a value nothing is lost
    assert not residuals.adopt([Place("a", 0, 4)], 4, torch.float32, CPU).any()


def build() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ddp(
        nn.Sequential(
            *(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 67), nn.Tanh()),
            *(nn.Linear(67, 43), nn.Tanh(), nn.Linear(43, 5)),
        )
    )
    return model, torch.optim.Adam(model.parameters(), lr=3e-3)


def train(model: Any, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        batch = torch.randn(8, 23, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def interrupt_and_resume(rank: int, world_size: int, topology: str, full: bool) -> bool:
    options: dict[str, Any] = {"quantizer": "lloyd2", "topology": topology}
    model, optimizer = build()
    state = attach(model, **options)
    train(model, optimizer, rank, range(7))
    saved_state = state.full_state_dict() if full else state.state_dict()
    if full:
        torch.distributed.broadcast_object_list(box := [saved_state])
        saved_state = box[0]
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "hook": saved_state},
        file,
    )
    train(model, optimizer, rank, range(7, 14))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer_again = build()
    again.load_state_dict(saved["model"])
    optimizer_again.load_state_dict(saved["optimizer"])
    state_again = attach(again, **options)
    state_again.load_state_dict(saved["hook"])
    train(again, optimizer_again, rank, range(7, 14))
    assert state_again.steps == state.steps == 14
    return all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def resume_without_names(rank: int, world_size: int, full: bool, options: dict[str, Any]) -> bool:
    weights: list[Tensor] = []
    saved: list[Any] = []
    for _ in range(2):
        model = ddp(nn.Sequential(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 5)))
        state = EfficientAdamState(quantizer="lloyd2", **options)
        model.register_comm_hook(state, efficient_adam_hook)
        if saved:
            state.load_state_dict(saved[0])
        for step in range(8):
            if step >= 4 or not saved:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.fill_(1 / 64)
                model.zero_grad()
                seed = torch.Generator().manual_seed(100 * step + rank)
                loss_of(model, torch.randn(8, 23, generator=seed)).backward()
            if step == 3 and not saved:
                saved = [state.full_state_dict() if full else state.state_dict()]
                if full:
                    torch.distributed.broadcast_object_list(saved)
        weights.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    if full:
        named = ddp(nn.Sequential(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 5)))
        with pytest.raises(
            StateMismatchError, match="Load it into a state that is registered in the"
        ):
            attach(named, quantizer="lloyd2", **options).load_state_dict(saved[0])
        late = EfficientAdamState(quantizer="lloyd2", **options)
        late.load_state_dict(saved[0])
        if options["topology"] != "sharded":
            with pytest.raises(EffAdamError, match=r"before load_state_dict\(\) and the first"):
                late.bind(named.module.named_parameters())
    return torch.equal(*weights)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"topology": "sharded"}),
        (4, {"topology": "auto", "device_mesh": (2, 2)}),
    ],
)
def test_a_run_without_names_resumes_to_the_bit(
    ranks: int, options: dict[str, Any], full: bool
) -> None:
    assert run_ranks(resume_without_names, ranks, full, options) == [True] * ranks


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(topology: str, full: bool) -> None:
    assert run_ranks(interrupt_and_resume, 3, topology, full) == [True, True, True]


def save_all(rank: int, world_size: int, topology: str) -> tuple[dict[str, Any], dict[str, Any]]:
    model = ddp(ChosenGradients(dtype=torch.float64))
    state = attach(model, quantizer="lloyd2", topology=topology)
    for step in range(4):
        model.zero_grad()
        model(drawn_gradients(rank, step, dtype=torch.float64)).backward()
    return state.full_state_dict(), state.state_dict()


def load_all(
    rank: int, world_size: int, topology: str, full: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    model = ddp(ChosenGradients(dtype=torch.float64))
    state = attach(model, quantizer="lloyd2", topology=topology)
    state.load_state_dict(full)
    before = state.state_dict()
    model(drawn_gradients(rank, 9, dtype=torch.float64)).backward()
    return before, state.state_dict()


def mean_worker(states: list[dict[str, Any]], name: str) -> Tensor:
    return torch.stack([state["worker"][name] for state in states]).mean(dim=0)


def whole_server(states: list[dict[str, Any]], name: str, numel: int) -> Tensor:
    whole = torch.full((numel,), torch.nan, dtype=torch.float64)
    for state in states:
        if name in state["server"]:
            start, share = state["server_start"][name], state["server"][name]
            assert whole[start : start + share.numel()].isnan().all(), "shares overlap"
            whole[start : start + share.numel()] = share
    return whole


@pytest.mark.parametrize(("before", "after"), [("rank0", "sharded"), ("sharded", "rank0")])
@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(3, 2), (2, 4)])
def test_other_ranks_and_topologies_resume_with_the_means_kept(
    before: str, after: str, ranks_before: int, ranks_after: int
) -> None:
    results = run_ranks(save_all, ranks_before, before)
    full = results[0][0]
    assert all(not other for other, _ in results[1:])
    saved = [state for _, state in results]
    loaded = [state for state, _ in run_ranks(load_all, ranks_after, after, full)]
    for p, shape in enumerate(SHAPES):
        name, numel = f"weights.{p}", torch.Size(shape).numel()
        assert torch.allclose(
            mean_worker(loaded, name), mean_worker(saved, name), rtol=1e-14, atol=1e-300
        )
        assert torch.equal(whole_server(loaded, name, numel), whole_server(saved, name, numel))


def refuse(rank: int, world_size: int) -> dict[str, str]:
    model = ddp(ChosenGradients())
    state = attach(model)
    for step in range(3):
        model(drawn_gradients(rank, step)).backward()
    good = state.state_dict()
    other = ddp(ChosenGradients(((4, 4), (3, 3))))
    other_state = attach(other)
    other(drawn_gradients(rank, 0, ((4, 4), (3, 3)))).backward()
    poisoned = state.state_dict()
    poisoned["worker"]["weights.0"][5] = torch.nan
    bad = {
        "foreign": {"weights": 1},
        "version": {**good, "version": 99},
        "model": other_state.state_dict(),
        "nan": with_checksum(poisoned),
        "damaged": poisoned,
        "rank": with_checksum({**good, "rank": 1 - rank}),
        "missing rank": {"version": 1, "ranks": [good, good]},
    }
    messages = {}
    for name, saved in bad.items():
        try:
            state.load_state_dict(saved)
        except StateMismatchError as error:
            messages[name] = str(error)
    untouched = state.state_dict()
    for side in ("worker", "server"):
        assert untouched[side].keys() == good[side].keys()
        assert all(torch.equal(untouched[side][n], good[side][n]) for n in good[side])
    return messages


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    for messages in run_ranks(refuse, 2):
        assert "no saved state of EfficientAdamState" in messages["foreign"]
        assert "version 99. Must be at most 2" in messages["version"]
        assert (
            "do not match" not in messages["nan"]
            and "The saved state is damaged" in messages["damaged"]
        )
        assert "the parameter has" in messages["model"]
        assert "'weights.0' holds a NaN" in messages["nan"]
        assert "Load each rank's own state" in messages["rank"]
        assert "Must be the states of all ranks" in messages["missing rank"]


def test_a_state_needs_a_process_group_only_when_used() -> None:
    state = EfficientAdamState()
    with pytest.raises(RuntimeError, match=r"Call torch\.distributed\.init_process_group"):
        state.state_dict()
