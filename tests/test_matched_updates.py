"""Steps of update mode that are matched to those of DDP with AdamW."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effadam_hook import EfficientAdam, attach
from effadam_hook.optim.matching import MatchedStep, Matching
from effadam_hook.optim.pending import MomentStep
from effadam_hook.wire.quantizers import QUANTIZERS
from harness import run_ranks
from kernel_cases import IMPLEMENTATIONS, decode, encode, layout_of
from training import ChosenGradients, ddp, drawn_gradients

F64 = torch.float64
SHAPES = ((64, 128), (128,))


def gradients_of(rank: int, step: int, signal: float) -> list[Tensor]:
    """Return noise of variance 1 that differs between the ranks, plus a constant mean."""
    noise = torch.Generator().manual_seed(1000 * step + rank)
    common = torch.Generator().manual_seed(7)
    return [
        torch.randn(s, generator=noise, dtype=F64)
        + signal * torch.randn(s, generator=common, dtype=F64).sign()
        for s in SHAPES
    ]


def step_lengths(
    rank: int, world_size: int, signal: float, quantizer: str, warmup_steps: int
) -> dict[str, list[float]]:
    """Return the root mean square of the steps of every parameter late in training, by method."""
    models = {name: ddp(ChosenGradients(SHAPES, F64)) for name in ("local", "matched", "adamw")}
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: EfficientAdam(models[name].parameters(), lr=0.01, second_moment=name)
        for name in ("local", "matched")
    }
    optimizers["adamw"] = torch.optim.AdamW(models["adamw"].parameters(), 0.01, weight_decay=0.0)
    for name in ("local", "matched"):
        attach(
            models[name],
            optimizer=optimizers[name],
            quantizer=quantizer,
            warmup_steps=warmup_steps,
        )
    squares: dict[str, list[float]] = {name: [0.0] * len(SHAPES) for name in models}
    for step in range(60):
        for name, model in models.items():
            before = [p.detach().clone() for p in model.parameters()]
            model.zero_grad()
            model(gradients_of(rank, step, signal)).backward()
            optimizers[name].step()
            if step >= 30:
                for index, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
                    squares[name][index] += float((p.detach() - old).square().mean()) / 30
    return {name: [square**0.5 for square in each] for name, each in squares.items()}


@pytest.mark.parametrize(
    ("signal", "quantizer", "warmup_steps"),
    [(0.0, "none", 0), (0.3, "none", 0), (0.1, "none", 20), (3.0, "lloyd4", 0)],
)
def test_steps_have_the_length_of_those_of_ddp(
    signal: float, quantizer: str, warmup_steps: int
) -> None:
    lengths = run_ranks(step_lengths, 4, signal, quantizer, warmup_steps)[0]
    for local, matched, adamw in zip(*lengths.values(), strict=True):
        assert matched == pytest.approx(adamw, rel=0.06)
        if signal < 1:
            assert local < 0.9 * adamw


def train(rank: int, world_size: int, topology: str, warmup_steps: int, saves: bool) -> Any:
    def build() -> Any:
        model = ddp(ChosenGradients())
        optimizer = EfficientAdam(model.parameters(), lr=0.01, second_moment="matched")
        options = {"quantizer": "sign", "topology": topology, "warmup_steps": warmup_steps}
        return model, optimizer, attach(model, optimizer=optimizer, **options)

    torch.set_num_threads(1 + rank)  # sums of floats would differ
    model, optimizer, state = build()
    for step in range(16):
        if saves and step in (6, 13):
            saved = state.state_dict(), model.state_dict(), optimizer.state_dict()
            state.close()
            model, optimizer, state = build()
            model.load_state_dict(saved[1])
            if step == 13:
                optimizer.load_state_dict(saved[2])
            state.load_state_dict(saved[0])
        state.enabled = step not in (11, 12)
        model.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_replicas_topologies_and_resumed_runs_are_equal_to_the_bit() -> None:
    runs = [
        run_ranks(train, 3, "rank0", 5, False),
        run_ranks(train, 3, "sharded", 5, True),
    ]
    want = runs[0][0]
    for got in (*runs[0], *runs[1]):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def against_adamw(rank: int, world_size: int) -> float:
    models = ddp(ChosenGradients(dtype=F64)), ddp(ChosenGradients(dtype=F64))
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}
    matched = EfficientAdam(models[0].parameters(), second_moment="matched", **settings)
    optimizers = matched, torch.optim.AdamW(models[1].parameters(), **settings)
    state = attach(models[0], optimizer=matched, quantizer="none")
    worst = 0.0
    for step in range(12):
        state.enabled = world_size == 1 and step not in (3, 4)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            model(drawn_gradients(rank, step, dtype=F64)).backward()
            optimizer.step()
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_worker_and_dense_steps_are_adamw(world_size: int) -> None:
    assert max(run_ranks(against_adamw, world_size)) <= 1e-13


def test_a_resumed_run_on_other_workers_keeps_the_share_of_the_signal() -> None:
    state: dict[str, Any] = {"step": 0, "decay": 1.0}
    factors = []
    for workers in (4, 9):
        for _ in range(3):
            generator = torch.Generator().manual_seed(state["step"])
            update = torch.randn(300, 400, generator=generator) / workers**0.5
            moment = MomentStep(0.0, 0.999, True)
            matching = Matching(workers, 1.0)
            matching.record(state, moment, 0.9, dense=False)
            (factor,) = matching.factors([MatchedStep(state, update, moment, alpha=1.0)])
            state["step"] += 1
            state["decay"] *= 0.999
        assert factor is not None
        factors.append(float(factor))
    assert factors == [pytest.approx(2, rel=0.02), pytest.approx(3, rel=0.02)]


def test_factors_remain_between_1_and_the_root_of_n() -> None:
    matching, moment = Matching(4, 0.5), MomentStep(0.45, 0.999, True)
    drawn = torch.randn(3, 7, 5000, generator=torch.Generator().manual_seed(0))
    channels_last = drawn[:, :, :90].reshape(3, 7, 9, 10).to(memory_format=torch.channels_last)
    updates = [
        *(
            torch.zeros(5, 3),
            torch.zeros(0),
            torch.full((9,), torch.inf),
            torch.full((9,), torch.nan),
        ),
        *(drawn, drawn.double(), channels_last, torch.tensor(0.3), 1e30 * drawn, 1e-30 * drawn),
    ]
    states: list[dict[str, Any]] = [{"step": 0, "decay": 1.0} for _ in updates]
    for step, alpha in enumerate((0.0, 1e-8, 1e-3, 1.0, 0.0, 1e-310)):
        for state in states:
            matching.record(state, moment, 0.9, dense=step == 3)
        steps = [MatchedStep(s, u, moment, alpha) for s, u in zip(states, updates, strict=True)]
        factors = [] if step == 3 else matching.factors(steps)
        for factor, update in zip(factors, updates):  # noqa: B905
            assert factor is not None and factor.dtype == update.dtype
            assert 1 <= float(factor) <= 2
            assert step or float(factor) == 1  # a rate of zero tells nothing
        for state in states:
            state["step"] += 1
            state["decay"] *= moment.beta2
    assert [float(state["signal"]) < 0 for state in states][:2] == [True, True]


class Calls(TorchDispatchMode):
    """Counts the calls that read or write elements."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_factors_need_few_calls_and_no_value_on_the_host() -> None:
    moment = MomentStep(0.9, 0.999, True)
    matching = Matching(4, 1.0)
    updates = [torch.empty(100, 90 + i, device="meta") for i in range(100)]
    states: list[dict[str, Any]] = [{"step": 0, "decay": 1.0} for _ in updates]
    counts = []
    for _ in range(2):
        for state in states:
            matching.record(state, moment, 0.9, dense=False)
        steps = [MatchedStep(s, u, moment, 0.01) for s, u in zip(states, updates, strict=True)]
        with Calls() as calls:
            matching.factors(steps)
        counts.append(calls.count)
    assert counts[1] <= 60


def continue_with(rank: int, world_size: int, names: tuple[str, str]) -> list[str]:
    saved = None
    for name in names:
        model = ddp(ChosenGradients())
        optimizer = EfficientAdam(model.parameters(), lr=0.01, second_moment=name)
        state = attach(model, optimizer=optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if saved is not None:
                state.load_state_dict(saved)
        model(drawn_gradients(rank, 0)).backward()
        optimizer.step()
        saved = state.state_dict()
        state.close()
    return [str(each.message) for each in caught]


def test_a_change_of_the_length_of_steps_is_announced() -> None:
    (message,) = run_ranks(continue_with, 2, ("local", "matched"))[0]
    assert message.startswith('The saved moments are those of second_moment="local"')
    for names in (("local", "local"), ("matched", "matched"), ("matched", "local")):
        assert run_ranks(continue_with, 2, names) == [[], []]


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_the_energy_of_a_quantizer_is_that_of_normal_numbers(name: str) -> None:
    x = torch.randn(256 * 200, generator=torch.Generator().manual_seed(0))
    layout = layout_of([x.numel()], name, block_size=256)
    kernels = IMPLEMENTATIONS[0].values[0]
    payload = encode(kernels, layout.uplink, x)
    decoded = decode(kernels, layout.uplink, payload, x.dtype)
    error = float((x - decoded).square().mean() / x.square().mean())
    assert 1 - QUANTIZERS[name].energy == pytest.approx(error, rel=0.15, abs=1e-3)


def test_options_that_cannot_be_matched_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="bias_correction: False with second_moment"):
        EfficientAdam([parameter], second_moment="matched", bias_correction=False)
    (message,) = run_ranks(quantize_weights, 1)
    assert message.startswith('Invalid second_moment: "matched" with quantize_weights=True')


def quantize_weights(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), second_moment="matched")
    with pytest.raises(ValueError, match="quantize_weights=True") as refused:
        attach(model, optimizer=optimizer, quantize_weights=True)
    return str(refused.value)
