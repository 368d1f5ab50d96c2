"""States of other optimizers in EfficientAdam, and copies of it."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from effadam_hook import EffAdamError, EfficientAdam, StateMismatchError, attach
from effadam_hook.feedback.checksum import with_checksum
from effadam_hook.optim.schedules import PowerSchedule
from harness import run_ranks
from training import ChosenGradients, ddp, drawn_gradients

F64 = torch.float64
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.97), "weight_decay": 0.1}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad()
        model(drawn_gradients(0, step, dtype=F64)).backward()  # the same on all ranks
        optimizer.step()


def apart(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def take_over(
    rank: int, world_size: int, kind: str, attaches_first: bool, settings: dict[str, Any]
) -> tuple[float, float]:
    """The distance from torch's optimizer after it has handed over, and after it has taken back."""
    inner = ChosenGradients(dtype=F64)
    dense = ddp(inner)
    make = getattr(torch.optim, kind)
    options = {**SETTINGS, **({"weight_decay": 0.0} if kind == "Adam" else {})}
    theirs = make(dense.parameters(), **options)
    train(dense, theirs, range(10))
    file = io.BytesIO()
    torch.save({"model": inner.state_dict(), "optimizer": theirs.state_dict()}, file)
    train(dense, theirs, range(10, 20))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    mine = ChosenGradients(dtype=F64)
    mine.load_state_dict(saved["model"])
    model = ddp(mine)
    ours = EfficientAdam(model.parameters(), lr=5.0, **settings)
    if not attaches_first:
        ours.load_state_dict(saved["optimizer"])
    attach(model, optimizer=ours, quantizer="none", topology="sharded")
    if attaches_first:
        ours.load_state_dict(saved["optimizer"])
    train(model, ours, range(10, 20))
    over = apart(inner, mine)

    back = make(mine.parameters(), **options)
    back.load_state_dict(ours.state_dict())
    train(mine, back, range(20, 25))
    train(dense, theirs, range(20, 25))
    return over, apart(inner, mine)


@pytest.mark.parametrize(
    "settings",
    [{"second_moment": "local"}, {"second_moment": "shared", "refresh_every": 20}],
)
@pytest.mark.parametrize("attaches_first", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_moments_of_torch_s_adam_are_taken_over_and_given_back(
    kind: str, attaches_first: bool, settings: dict[str, Any]
) -> None:
    for distances in run_ranks(take_over, 3, kind, attaches_first, settings):
        assert max(distances) <= 1e-12


def load_on_one_rank(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients(dtype=F64))
    ours = EfficientAdam(model.parameters(), **SETTINGS)
    if rank == 1:
        twin = ChosenGradients(dtype=F64)
        theirs = torch.optim.AdamW(twin.parameters(), **SETTINGS)
        train(twin, theirs, range(3))
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(EffAdamError) as caught:
        attach(model, optimizer=ours)
    return str(caught.value)


def test_moments_that_only_one_rank_has_are_seen_in_attach() -> None:
    for message in run_ranks(load_on_one_rank, 2):
        assert "optimizer.steps is '3' on rank 1 and '0' on rank 0" in message


def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    model = nn.Linear(7, 3)
    optimizer = make(model.parameters())
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


OTHERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), "no betas, eps"),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "no betas, eps"),
    "rmsprop": (torch.optim.RMSprop, "no betas"),
    "adagrad": (torch.optim.Adagrad, "no betas"),
    "adamax": (torch.optim.Adamax, "Must hold exp_avg, exp_avg_sq"),
    "nadam": (torch.optim.NAdam, "unknown entries mu_product"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True. Must be False"),
    "maximize": (lambda p: torch.optim.AdamW(p, maximize=True), "maximize=True. Must be False"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_states_of_other_optimizers_are_refused_where_they_are_loaded(name: str) -> None:
    make, said = OTHERS[name]
    refuse(stepped(make), said)


@pytest.mark.skipif(
    "decoupled_weight_decay" not in torch.optim.Adam([nn.Parameter(torch.ones(1))]).defaults,
    reason="this torch does not save whether weight decay is decoupled",
)
def test_coupled_weight_decay_is_refused() -> None:
    refuse(
        stepped(lambda p: torch.optim.Adam(p, weight_decay=0.1)), "Must be decoupled, as in AdamW"
    )


def refuse(saved: dict[str, Any], said: str) -> None:
    model = nn.Linear(7, 3)
    ours = EfficientAdam(model.parameters(), lr=0.5)
    ours.recursion.init_state(model.weight)["exp_avg"].fill_(2.0)
    with pytest.raises(StateMismatchError) as caught:
        ours.load_state_dict(saved)
    assert said in str(caught.value)
    assert ours.param_groups[0]["lr"] == 0.5
    assert bool((ours.state[model.weight]["exp_avg"] == 2.0).all())


ALTERED: dict[str, tuple[dict[str, Any], str]] = {
    "fraction": ({"step": torch.tensor(1.5)}, "a whole number"),
    "negative": ({"step": torch.tensor(-1.0)}, "a whole number"),
    "nan": ({"step": torch.tensor(math.nan)}, "a whole number"),
    "text": ({"step": "7"}, "a whole number"),
    "huge": ({"step": 10**400}, "a whole number"),
    "vector": ({"step": torch.ones(2)}, "a whole number"),
    "decay": ({"decay": math.nan}, "a number from 0 to 1"),
    "decay is a tensor": ({"decay": torch.tensor(0.5)}, "a number from 0 to 1"),
    "refreshed": ({"refreshed": 99}, "at most step = 1"),
    "shape": ({"exp_avg": torch.zeros(7, 3)}, "(3, 7), its own"),
    "moment": ({"exp_avg": 1.0}, "a floating tensor"),
    "integers": ({"exp_avg_sq": torch.ones(3, 7, dtype=torch.int64)}, "a floating tensor"),
    "infinite": ({"exp_avg": torch.full((3, 7), math.inf)}, "Must be finite"),
    "negative square": ({"exp_avg_sq": -torch.ones(3, 7)}, "it averages squares"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_states_are_refused_where_they_are_loaded(name: str) -> None:
    changes, said = ALTERED[name]
    saved = stepped(torch.optim.AdamW)
    saved["state"][0] = {**saved["state"][0], **changes}
    refuse(saved, said)


def load_moments(rank: int, world_size: int) -> list[str]:
    """Messages of altered moments in the hook's own state; nothing may change, nothing may break."""
    model = ddp(ChosenGradients(dtype=F64))
    optimizer = EfficientAdam(model.parameters(), second_moment="shared", refresh_every=2)
    state = attach(model, optimizer=optimizer, quantizer="lloyd2")
    train(model, optimizer, range(3))
    good = state.state_dict()
    messages = []
    altered: list[tuple[str, Any]] = [
        *[("step", value) for value in (-1, "7", math.nan, None, 1.0, True, 10**400, ...)],
        *[("decay", value) for value in (-0.1, 2.0, math.nan, "x", True, None, ...)],
        *[("refreshed", value) for value in (-1, 4, 1.5)],
        *[("unused", value) for value in (-1, None)],
        ("estimate_until", "never"),
        ("strange", 1),
        ("exp_avg_sq", -good["moments"]["weights.3"]["exp_avg_sq"]),
        ("exp_avg", good["moments"]["weights.3"]["exp_avg"] * math.nan),
        ("exp_avg", good["moments"]["weights.3"]["exp_avg"][1:]),
        ("exp_avg", ...),
    ]
    for key, value in altered:
        saved = copy.deepcopy(good)
        entry = saved["moments"]["weights.3"]
        entry.pop(key, None)
        if value is not ...:
            entry[key] = value
        with pytest.raises(StateMismatchError) as caught:
            state.load_state_dict(with_checksum(saved))
        messages.append(str(caught.value))
        assert str(key) in messages[-1] or "NaN" in messages[-1], (key, messages[-1])
    train(model, optimizer, range(3, 5))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    state.load_state_dict(good)
    return messages


def test_every_value_of_saved_moments_is_checked() -> None:
    for messages in run_ranks(load_moments, 1):
        assert all("weights.3" in message for message in messages)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_keeps_its_options_and_says_that_it_is_not_attached(way: str) -> None:
    model = nn.Linear(7, 3)
    ours = EfficientAdam(
        model.parameters(),
        **SETTINGS,
        bias_correction=False,
        second_moment="shared",
        refresh_every=5,
        max_grad_norm=0.5,
        schedule=PowerSchedule(1e-3, 0.2, 0.1, 0.9),
    )
    ours.recursion.attach_to(model.named_parameters())
    for parameter in model.parameters():
        ours.recursion.init_state(parameter)["exp_avg"].fill_(2.0)
    if way == "deepcopy":
        other = copy.deepcopy(ours)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for name in ("bias_correction", "second_moment", "refresh_every", "max_grad_norm", "schedule"):
        assert getattr(other, name) == getattr(ours, name)
    assert other.param_groups[0]["betas"] == (0.8, 0.97)
    assert all(bool((state["exp_avg"] == 2.0).all()) for state in other.state.values())
    assert len(other.state) == 2
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(EffAdamError, match="a copy of an attached optimizer"):
        other.step()
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(ours.state_dict())
    assert ours.recursion.names is not None


def train_a_copy(rank: int, world_size: int) -> float:
    """The distance between a run and that of a copy of model and optimizer, attached anew."""
    inner = ChosenGradients(dtype=F64)
    model = ddp(inner)
    optimizer = EfficientAdam(model.parameters(), second_moment="shared", **SETTINGS)
    attach(model, optimizer=optimizer, quantizer="none")
    train(model, optimizer, range(5))
    twin, other = copy.deepcopy((inner, optimizer))
    again = ddp(twin)
    attach(again, optimizer=other, quantizer="none")
    train(model, optimizer, range(5, 9))
    train(again, other, range(5, 9))
    return apart(inner, twin)


def test_a_copy_that_is_attached_goes_on_where_the_original_was() -> None:
    assert run_ranks(train_a_copy, 2) == [0.0, 0.0]


class Sparse(nn.Module):
    """An embedding whose gradient is sparse, which DDP may or may not see in the modules."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "Embedding":
            self.table: Any = nn.Embedding(29, 7, sparse=True)
        elif kind == "EmbeddingBag":
            self.table = nn.EmbeddingBag(29, 7, sparse=True)
        else:
            self.table = nn.Embedding(29, 7)
        self.kind, self.head = kind, nn.Linear(7, 3)

    def forward(self, index: Tensor) -> Tensor:
        if self.kind == "functional":
            rows = functional.embedding(index, self.table.weight, sparse=True)
        else:
            rows = self.table(index)
        out: Tensor = self.head(rows)
        return out


def use_sparse(rank: int, world_size: int, kind: str, warmup_steps: int) -> str:
    model = ddp(Sparse(kind))
    optimizer = EfficientAdam(model.parameters())
    try:
        attach(model, optimizer=optimizer, warmup_steps=warmup_steps)
        model(torch.tensor([[1, 2], [3, rank]])).sum().backward()
    except EffAdamError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("warmup_steps", [0, 2])
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag", "functional"])
def test_sparse_gradients_are_refused_on_all_ranks(kind: str, warmup_steps: int) -> None:
    for message in run_ranks(use_sparse, 3, kind, warmup_steps):
        assert "'table.weight'" in message
        assert "use sparse=False" in message


class Wrapper:
    """As Accelerate's and Lightning's: it has the optimizer, and is none."""

    def __init__(self, optimizer: Any, name: str = "optimizer") -> None:
        setattr(self, name, optimizer)


def wrap(rank: int, world_size: int) -> list[str]:
    messages = []
    for name in ("optimizer", "_optimizer"):
        model = ddp(ChosenGradients(dtype=F64))
        ours = EfficientAdam(model.parameters())
        attach(model, optimizer=Wrapper(Wrapper(ours, name)), quantize_weights=name == "optimizer")
        train(model, ours, range(2))
        model = ddp(ChosenGradients(dtype=F64))
        adam = torch.optim.AdamW(model.parameters())
        state = attach(model, optimizer=Wrapper(adam, name), precondition=True)
        train(model, adam, range(2))
        assert "preconditioned" in state.summary()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    endless = Wrapper(None)
    endless.optimizer = endless
    for held in (Wrapper(sgd), Wrapper("nothing"), endless, adam):
        for options in ({}, {"precondition": held is not adam}, {"quantize_weights": True}):
            if held is adam and "precondition" in options:
                continue
            with pytest.raises(TypeError) as caught:
                attach(ddp(ChosenGradients()), optimizer=held, **options)
            messages.append(str(caught.value))
    return messages


def test_a_wrapped_optimizer_is_unwrapped_or_named() -> None:
    for messages in run_ranks(wrap, 2):
        assert all("Invalid optimizer" in message for message in messages)
        assert sum("Wrapper around SGD" in message for message in messages) == 3


def train_by_lightning(rank: int, world_size: int, folder: str) -> list[Any]:
    from lightning_plugin import EfficientAdamStrategy
    from lightning_training import (
        FAMILIES,
        load_family,
        loader,
        make_module,
        make_trainer,
        pose_as_torchrun,
        weights,
    )

    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    path = f"{folder}/dense.ckpt"

    def strategy(quantizer: str = "none") -> Any:
        return EfficientAdamStrategy(quantizer=quantizer, bucket_cap_mb=0.004)

    def make(kind: Any, **options: Any) -> Any:
        return lambda parameters: kind(parameters, lr=3e-3, weight_decay=0.01, **options)

    trainer = make_trainer(family, "ddp", folder)
    trainer.fit(make_module(family, make(torch.optim.AdamW)), loader())
    trainer.save_checkpoint(path)
    results: list[Any] = []
    for kind, options, one in (
        (torch.optim.AdamW, {}, "ddp"),
        (EfficientAdam, {"second_moment": "shared", "refresh_every": 99}, strategy()),
    ):
        module = make_module(family, make(kind, **options))
        trainer = make_trainer(family, one, folder, max_epochs=2)
        trainer.fit(module, loader(), ckpt_path=path)
        results.append(weights(module))
    trainer = make_trainer(family, "ddp", folder)
    trainer.fit(make_module(family, make(torch.optim.AdamW, amsgrad=True)), loader())
    trainer.save_checkpoint(path)
    trainer = make_trainer(family, strategy(), folder, max_epochs=2)
    with pytest.raises(StateMismatchError) as caught:
        trainer.fit(make_module(family, make(EfficientAdam)), loader(), ckpt_path=path)
    return [*results, str(caught.value)]


def test_lightning_goes_on_from_a_checkpoint_of_adamw(tmp_path: Any) -> None:
    pytest.importorskip("lightning")
    for want, got, message in run_ranks(train_by_lightning, 2, str(tmp_path)):
        assert all(float((a - b).abs().max()) <= 1e-5 for a, b in zip(got, want, strict=True))
        assert "amsgrad=True" in message
