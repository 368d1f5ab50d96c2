"""Parameters are identified by name under all wrappers; those that DDP ignores have no effect."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import (
    EffAdamError,
    EfficientAdam,
    EfficientAdamState,
    attach,
    efficient_adam_hook,
)
from effadam_hook.config import Config
from effadam_hook.feedback.parameters import ParameterTable, identify
from effadam_hook.wire.names import canonical_name, canonical_names, nearest_names
from harness import run_ranks
from training import close, ddp


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("head.weight", "head.weight"),
        ("_orig_mod.head.weight", "head.weight"),
        ("module.head.weight", "head.weight"),
        ("module._orig_mod.head.weight", "head.weight"),
        ("_orig_mod.module.head.weight", "head.weight"),
        ("body.0._checkpoint_wrapped_module._orig_mod.weight", "body.0.weight"),
        ("_fsdp_wrapped_module.body._fsdp_wrapped_module.weight", "body.weight"),
        ("body.module.weight", "body.module.weight"),
        ("module", "module"),
        ("_orig_mod", "_orig_mod"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.w", "_orig_mod.b.w"], ["a.w", "b.w"]),
        (["a.w", "_orig_mod.a.w"], ["a.w", "_orig_mod.a.w"]),
        (["module.w", "w", "b"], ["module.w", "w", "b"]),
        (["module.w", "w", "module._orig_mod.module.w"], None),
    ],
)
def test_names_that_would_collide_are_kept(names: list[str], expected: list[str] | None) -> None:
    assert list(canonical_names(names).values()) == (expected or names)


def test_a_tied_parameter_answers_to_all_its_names() -> None:
    first, second = torch.zeros(3), torch.zeros(2)
    named = [("_orig_mod.a.w", first), ("b", second), ("head._checkpoint_wrapped_module.w", first)]
    (a, _), (b, _) = identify(named)
    assert (a.name, b.name) == ("a.w", "b")
    assert {"a.w", "_orig_mod.a.w", "head.w"} <= set(a.aliases)
    table = ParameterTable()
    table.bind(named)
    assert [table.resolve(n) for n in ("head.w", "module.a.w", "b", "c")] == [
        "a.w",
        "a.w",
        "b",
        "c",
    ]
    with pytest.raises(ValueError, match="2 parameters with 1 different names"):
        ParameterTable().bind([("a", first), ("a", second)])


def test_a_pattern_without_a_match_lists_near_names() -> None:
    names = ["body.0.weight", "body.norm.weight", "head.weight", "head.bias"]
    assert nearest_names("haed.*", names)[0].startswith("head.")
    assert "body.norm.weight" in nearest_names("*.nrom*", names)
    config = Config(exact=("1d", "<9", "*.norm.*", "haed.weight"))
    with pytest.raises(
        ValueError, match=r"'haed.weight', which matches no.*'head.weight'.*Correct"
    ):
        config.check_patterns(names)
    with pytest.raises(ValueError, match=r"'xyz\?'.*the first names of the model are 'body.0.wei"):
        Config(exact=("xyz?",)).check_patterns(names)
    Config(exact=("1d", "<9", "head.*")).check_patterns(names)


class Net(nn.Module):
    """A body and a head of equal, odd sizes, and a parameter of the root."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(5, 7))
        self.body, self.head = nn.Linear(35, 35), nn.Linear(35, 35)
        if tied:
            self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x * self.scale.view(-1)))).square().mean()


def wrapped(how: str) -> nn.Module:
    net = Net(tied=how == "tied")
    if how == "compiled":
        return torch.compile(net, backend="eager")  # type: ignore[return-value]
    if how == "part compiled":
        net.head = torch.compile(net.head, backend="eager")  # type: ignore[assignment]
    if how == "checkpointed":
        net.head = checkpoint_wrapper(net.head)
    return net


def batch(rank: int, step: int = 0) -> Tensor:
    return torch.randn(8, 35, generator=torch.Generator().manual_seed(10 * step + rank))


def exact_under(rank: int, world_size: int, how: str, pattern: str) -> tuple[list[str], int]:
    model = DistributedDataParallel(wrapped(how))
    state = attach(model, quantizer="sign", exact=("1d", pattern), topology="sharded")
    for step in range(3):
        model.zero_grad()
        model(batch(rank, step)).backward()
    slots = [slot for plan in state.session.buckets for slot in plan.layout.slots]
    return sorted(slot.name for slot in slots if slot.exact), len(slots)


HOWS = ("eager", "compiled", "part compiled", "checkpointed", "tied")


@pytest.mark.parametrize("how", HOWS)
def test_a_pattern_matches_whatever_wraps_the_model(how: str) -> None:
    weight = "body.weight" if how == "tied" else "head.weight"
    for exact, count in run_ranks(exact_under, 2, how, "head.*"):
        assert exact == sorted(["body.bias", "head.bias", weight])
        assert count == (4 if how == "tied" else 5)


def compiled_ddp(rank: int, world_size: int) -> tuple[list[Tensor], str]:
    model = DistributedDataParallel(Net())
    compiled = torch.compile(model, backend="eager")
    state = attach(compiled, quantizer="lloyd4")
    with pytest.raises(EffAdamError, match="already"):
        attach(model)
    with pytest.raises(
        TypeError, match=r"Invalid ddp_model: torch.compile of Net\. Must be a Dist"
    ):
        attach(torch.compile(Net(), backend="eager"))
    for step in range(3):
        model.zero_grad()
        compiled(batch(rank, step)).backward()
    assert state.stats()["ratio"] > 1
    return [p.grad for p in model.parameters()], sorted(state.state_dict()["worker"])[0]


def test_attach_takes_a_compiled_ddp_model() -> None:
    (first, name), (second, _) = run_ranks(compiled_ddp, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert name == "body.bias"


def patterns_alone(rank: int, world_size: int) -> list[str]:
    found = []
    for exact in (("head.*",), ("1d", "head.*"), ()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attach(DistributedDataParallel(Net()), exact=exact)
        found += [str(one.message) for one in caught if "exact" in str(one.message)]
        assert all(one.filename == __file__ for one in caught if "exact" in str(one.message))
    return found


def test_rules_that_replace_the_default_say_so_once() -> None:
    first, second = run_ranks(patterns_alone, 2)
    assert second == []  # one rank is enough
    (message,) = first
    assert "exact=('head.*',) replaces the default ('1d',)" in message
    assert "quantizer: 1, such as 'body.bias'. Write exact=('1d', 'head.*') to send" in message


def misspell(rank: int, world_size: int) -> str:
    model = ddp(Net())
    with pytest.raises(ValueError, match="nearest names are") as caught:
        attach(model, exact=("1d", "haed.*"))
    attach(model, exact=("1d", "head.*"))  # the model is still free
    model(batch(rank)).backward()
    with pytest.raises(ValueError, match="matches no parameter"):
        EfficientAdamState(exact=("*.nrom",)).bind(model.module.named_parameters())
    return str(caught.value)


def test_a_pattern_without_a_match_is_an_error_on_every_rank() -> None:
    messages = run_ranks(misspell, 3)
    assert len(set(messages)) == 1 and "'head." in messages[0]


def resume_wrapped(rank: int, world_size: int, first: str, second: str, mode: str) -> bool:
    """Continue training under another wrapper; the result is equal to that under the first."""

    def start(how: str) -> tuple[nn.Module, DistributedDataParallel, Any, EfficientAdamState]:
        net = wrapped(how)
        model = DistributedDataParallel(net)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {}
        if mode == "update":
            optimizer = EfficientAdam(model.parameters(), lr=1e-2)
            options["optimizer"] = optimizer
        state = attach(model, quantizer="lloyd2", topology="sharded", block_size=16, **options)
        return net, model, optimizer, state

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(batch(rank, step)).backward()
            optimizer.step()

    _, model, optimizer, state = start(first)
    train(model, optimizer, range(4))
    weights = [p.detach().clone() for p in model.parameters()]
    saved = state.state_dict()
    train(model, optimizer, range(4, 7))
    _, again, optimizer_again, state_again = start(second)
    with torch.no_grad():
        for parameter, weight in zip(again.parameters(), weights, strict=True):
            parameter.copy_(weight)
    state_again.load_state_dict(saved)
    train(again, optimizer_again, range(4, 7))
    return close(list(again.parameters()), list(model.parameters()))


@pytest.mark.parametrize("mode", ["gradient", "update"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("eager", "compiled"), ("compiled", "checkpointed"), ("checkpointed", "eager")],
)
def test_states_go_from_one_wrapper_to_another(first: str, second: str, mode: str) -> None:
    assert run_ranks(resume_wrapped, 2, first, second, mode) == [True, True]


# What DDP does not exchange


class WithTable(nn.Module):
    """A trained layer, and a table and a scale that DDP ignores."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5 + rank, 35)
        self.table.weight.data.fill_(0.01 * rank)
        torch.manual_seed(1)  # the table draws more numbers on some ranks
        self.dense, self.last = nn.Linear(35, 35), nn.Linear(35, 3)
        self.table.weight.requires_grad_("frozen" not in how)
        if how == "complex":
            self.table.weight = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
        if how == "meta":
            self.table.to("meta")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.table.weight
        if not weight.is_meta and not weight.is_complex():
            x = x + weight[:1]
        return self.last(torch.tanh(self.dense(x))).square().mean()


SECOND = ("shared", "local")
"""Shared second moments make update mode AdamW; they require equal steps of a whole bucket."""


def train_with_table(rank: int, world_size: int, how: str, kind: str) -> list[Tensor]:
    net = WithTable(rank, how)
    if "frozen" not in how:
        net._ddp_params_and_buffers_to_ignore = ["table.weight"]  # without DDP's own marks
    late = how == "frozen late"
    if late:
        net.table = nn.Embedding(5, 35)
    model = ddp(net, init_sync="frozen" not in how or late, find_unused_parameters=late)
    if late:
        net.table.weight.requires_grad_(False)
    own = [*net.dense.parameters(), *net.last.parameters()]
    optimizer: Any = torch.optim.AdamW(own, lr=1e-2)
    options: dict[str, Any] = {"exact": ("1d", "table.*"), "quantizer": "none"}
    if kind == "gradient":
        attach(model, **options)
    if kind == "precondition":
        attach(model, optimizer=optimizer, precondition=True, **options)
    if kind == "update":
        optimizer = EfficientAdam(own, lr=1e-2, weight_decay=1e-2, second_moment=SECOND[late])
        attach(model, optimizer=optimizer, **options)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(rank, step)).backward()
        optimizer.step()
    return [p.detach() for p in own]


@pytest.mark.parametrize("kind", ["gradient", "precondition", "update"])
@pytest.mark.parametrize("how", ["ignored", "meta", "complex", "frozen", "frozen late"])
def test_what_ddp_does_not_exchange_does_not_count(how: str, kind: str) -> None:
    plain = run_ranks(train_with_table, 3, how, "plain")
    ranks = run_ranks(train_with_table, 3, how, kind)
    for weights in ranks:
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0], strict=True))
        if (how, kind) != ("frozen late", "update"):
            assert close(weights, plain[0])


def ignore_at_the_root(rank: int, world_size: int) -> tuple[list[Tensor], list[str]]:
    """DDP exchanges a parameter of the root module unless its name is given with a dot before it."""
    arrived = []
    for name in ("scale", ".scale"):
        net = Net()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, [name])
        model = ddp(net)
        attach(model, quantizer="none")
        model(batch(rank)).backward()
        assert net.scale.grad is not None
        arrived.append(net.scale.grad)
    return arrived, [name for name, _ in net.named_parameters()]


def test_parameters_of_the_root_are_exchanged_as_ddp_does() -> None:
    (first, second), _ = run_ranks(ignore_at_the_root, 2)[0]
    (other_first, other_second), _ = run_ranks(ignore_at_the_root, 2)[1]
    assert torch.equal(first, other_first)
    assert not torch.equal(second, other_second)


def bind_by_hand(rank: int, world_size: int) -> list[str]:
    model = ddp(Net(tied=True))
    state = EfficientAdamState(quantizer="sign", exact=("1d", "head.*"))
    model.register_comm_hook(state, efficient_adam_hook)
    state.bind(model.module.named_parameters(remove_duplicate=False), model.process_group)
    model(batch(rank)).backward()
    slots = [slot for plan in state.session.buckets for slot in plan.layout.slots]
    return [slot.name for slot in slots if slot.exact and slot.numel > 35]


def test_a_state_bound_by_hand_knows_all_names() -> None:
    assert run_ranks(bind_by_hand, 2) == [["body.weight"]] * 2
