"""Saved states by name: other orders, models and shares, older versions, and damage."""

from __future__ import annotations

import copy
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.make_states import BLOCK_SIZE, CASES, ENDS_AT, SAVED_AT, Net, make_optimizer, options_of
from data.make_states import train as train_as_saved
from effadam_hook import EfficientAdam, EfficientAdamState, StateMismatchError, attach
from effadam_hook.feedback.checkpoint import RankState
from effadam_hook.feedback.checksum import checksum_of, with_checksum
from effadam_hook.feedback.reshard import Role, reassign
from harness import run_ranks
from training import ddp

DATA = Path(__file__).parent / "data"
MODES = ("gradient", "update", "weights")


class Chain(nn.Module):
    """Layers with different orders of declaration and of calls; further layers may be in between."""

    def __init__(self, declared: str) -> None:
        super().__init__()
        layers = {}
        for name in "abcxy":
            torch.manual_seed(ord(name))
            layers[name] = nn.Linear(37, 37)
        for name in declared:
            setattr(self, name, layers[name])
        self.called = sorted(declared)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.called:
            x = torch.tanh(getattr(self, name)(x))
        return x


def build(
    declared: str, mode: str, **options: Any
) -> tuple[DistributedDataParallel, Any, EfficientAdamState]:
    model = ddp(Chain(declared))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"quantizer": "lloyd2", "topology": "sharded", "block_size": 64, **options}
    if mode != "gradient":
        optimizer = EfficientAdam(model.parameters(), lr=1e-3)
        options |= {"optimizer": optimizer, "quantize_weights": mode == "weights"}
    return model, optimizer, attach(model, **options)


def train(model: nn.Module, optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        batch = torch.randn(8, 37, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def conserved(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return (1/N) Σ e_i + ẽ by name; ẽ of weights is subtracted."""
    totals: dict[str, Tensor] = {}
    for state in states:
        sign = -1 if "weights" in state["units"] else 1
        for name, residual in state["worker"].items():
            empty = torch.zeros(len(residual), dtype=torch.float64)
            total = totals.setdefault(name.removeprefix("_orig_mod."), empty)
            total += residual.double() / len(states)
        for name, residual in state["server"].items():
            start = state["server_start"][name]
            total = totals[name.removeprefix("_orig_mod.")]
            total[start : start + len(residual)] += sign * residual.double()
    return totals


def same_totals(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    """Return whether totals are equal to rounding, and zero for parameters that had none."""
    return set(want) <= set(got) and all(
        torch.allclose(value, want.get(name, torch.zeros_like(value)), rtol=1e-5, atol=1e-9)
        for name, value in got.items()
    )


def gather(value: Any) -> list[Any]:
    everywhere = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, value)
    return everywhere


def resume_as(
    rank: int, world_size: int, declared: str, mode: str, full: bool, options: dict[str, Any]
) -> tuple[bool, bool, Tensor]:
    model, optimizer, state = build("abc", mode)
    train(model, optimizer, rank, range(5))
    before = conserved(gather(state.state_dict()))
    box = gather(state.full_state_dict()) if full else [state.state_dict()]
    state.close()
    model, optimizer, state = build(declared, mode, **options)
    state.load_state_dict(box[0])
    loaded = conserved(gather(state.state_dict()))
    again = gather(state.full_state_dict())[0]  # whole and readable before the first step
    state.load_state_dict(again)
    reloaded = conserved(gather(state.state_dict()))
    train(model, optimizer, rank, range(5, 8))
    assert state.steps == 8
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return same_totals(loaded, before), same_totals(reloaded, before), weights


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("declared", "options"),
    [
        ("cab", {}),
        ("xabc", {}),
        ("abyc", {}),
        ("cab", {"topology": "rank0"}),
        ("bac", {"block_size": 16}),
    ],
)
def test_what_is_conserved_survives_another_model_order_and_other_shares(
    declared: str, mode: str, full: bool, options: dict[str, Any]
) -> None:
    ranks = run_ranks(resume_as, 3, declared, mode, full, options)
    for loaded, reloaded, weights in ranks:
        assert loaded and reloaded
        assert weights.isfinite().all() and torch.equal(weights, ranks[0][2])


def remove_a_layer(rank: int, world_size: int, full: bool) -> str:
    model, optimizer, state = build("abc", "gradient")
    train(model, optimizer, rank, range(3))
    box = gather(state.full_state_dict()) if full else [state.state_dict()]
    _, _, smaller = build("ac", "gradient")
    with pytest.raises(StateMismatchError) as caught:
        smaller.load_state_dict(box[0])
    assert smaller.steps == 0
    return str(caught.value)


@pytest.mark.parametrize("full", [False, True])
def test_a_removed_layer_is_named(full: bool) -> None:
    for message in run_ranks(remove_a_layer, 2, full):
        assert "'b.weight', which is no parameter of this model" in message


# States of version 0.1.0


def continue_old(
    rank: int, world_size: int, case: str, full: bool, order: str
) -> tuple[bool, float, Tensor]:
    """Return whether totals are kept, and the distance from the weights of 0.1.0 over their change."""
    saved = torch.load(DATA / f"state_0_1_0_{case}.state", weights_only=True)
    net = Net(order)
    net.load_state_dict(saved["model"])
    model = DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = make_optimizer(case, model)
    state = attach(model, **options_of(case, optimizer))  # type: ignore[arg-type]
    old = saved["full"]["ranks"]
    state.load_state_dict(saved["full"] if full else old[rank])
    assert state.steps == SAVED_AT
    kept = same_totals(conserved(gather(state.state_dict())), conserved(old))
    train_as_saved(model, optimizer, rank, range(SAVED_AT, ENDS_AT))
    apart = sum(float((p - saved["later"][n]).square().sum()) for n, p in net.named_parameters())
    moved = sum(float((v - saved["model"][n]).square().sum()) for n, v in saved["later"].items())
    weights = torch.cat([p.detach().flatten() for _, p in sorted(net.named_parameters())])
    return kept, (apart / moved) ** 0.5, weights


@pytest.mark.parametrize("order", ["abc", "cab"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_states_of_0_1_0_load_with_their_totals(case: str, full: bool, order: str) -> None:
    ranks = run_ranks(continue_old, 2, case, full, order)
    for kept, apart, weights in ranks:
        assert kept
        # A rank's own file may move residuals to a worker, which sends them a little earlier.
        assert apart < (0.01 if full else 0.5)
        assert torch.equal(weights, ranks[0][2])


@pytest.mark.parametrize("case", CASES)
def test_states_of_0_1_0_load_on_other_ranks(case: str) -> None:
    for kept, _, weights in run_ranks(continue_old, 3, case, True, "bca"):
        assert kept and weights.isfinite().all()


def test_a_share_that_moves_to_the_worker_moves_n_times() -> None:
    saved = torch.load(DATA / "state_0_1_0_sharded.state", weights_only=True)
    old = saved["full"]["ranks"]
    for sign, units in ((1, "gradients"), (-1, "updates and weights")):
        before = [{**state, "units": units} for state in old]
        after = [
            reassign(
                RankState.from_dict(state), Role(rank, 2, serves, 1, BLOCK_SIZE), sign
            ).to_dict()
            for (rank, state), serves in zip(enumerate(before), (None, 0), strict=True)
        ]
        assert not after[0]["server"]
        assert same_totals(conserved(after), conserved(before))


# Names


def load_two_of_one(rank: int, world_size: int) -> str:
    model, optimizer, state = build("abc", "gradient")
    train(model, optimizer, rank, range(3))
    good = state.state_dict()
    worker = {**good["worker"], "_orig_mod.b.weight": good["worker"]["b.weight"]}
    with pytest.raises(StateMismatchError) as caught:
        state.load_state_dict(with_checksum({**good, "worker": worker}))
    return str(caught.value)


def test_two_names_of_one_parameter_are_refused() -> None:
    for message in run_ranks(load_two_of_one, 1):
        assert "'b.weight' and one of '_orig_mod.b.weight', which are one parameter" in message


# Damage


def flip(value: Any, rng: random.Random) -> Any:
    """Return the value with one bit flipped."""
    if isinstance(value, Tensor):
        damaged = value.clone()
        data = damaged.view(torch.uint8)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return damaged
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ (1 << rng.randrange(31))
    if isinstance(value, float):
        bits = torch.tensor(value, dtype=torch.float64).view(torch.int64)
        return (bits ^ (1 << rng.randrange(62))).view(torch.float64).item()
    return str(value)[:-1] + chr(ord(str(value)[-1]) ^ 1) if value else "x"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, (*path, i))]
    return [] if isinstance(value, Tensor) and not value.numel() else [path]


def flip_bits(rank: int, world_size: int, mode: str) -> list[str]:
    model, optimizer, state = build("abc", mode, topology="rank0")
    train(model, optimizer, rank, range(3))
    good = state.state_dict()
    rng, silent = random.Random(7), []
    for path in leaves(good) * 4:
        damaged = copy.deepcopy(good)
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = flip(place[path[-1]], rng)
        for saved in (damaged, {"version": 2, "ranks": [damaged]}):
            try:
                state.load_state_dict(saved)
            except StateMismatchError as error:
                if "damaged" not in str(error) and path != ("version",):
                    silent.append(f"{path}: {error}")
            else:
                silent.append(f"{path}: loaded")
        if checksum_of(state.state_dict()) != good["checksum"]:
            silent.append(f"{path}: changed the running state")
    return silent


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_any_flipped_bit_is_noticed(mode: str) -> None:
    assert run_ranks(flip_bits, 1, mode) == [[]]


def test_the_checksum_survives_what_files_do_and_nothing_else() -> None:
    state = {
        "numbers": {"a": 1, "b": 2.5, "c": True, "d": None, "e": [1, "x"]},
        "tensors": {
            "half": torch.randn(5).to(torch.bfloat16),
            "empty": torch.zeros(0),
            "scalar": torch.tensor(3.0),
            "double": torch.randn(3, 4, dtype=torch.float64),
        },
    }
    first = checksum_of(state)
    file = io.BytesIO()
    torch.save(with_checksum(state), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    assert loaded["checksum"] == first == checksum_of(loaded)
    turned = {key: dict(reversed(value.items())) for key, value in reversed(state.items())}
    assert checksum_of(turned) == first
    turned["numbers"]["e"] = (1, "x")
    turned["tensors"]["double"] = turned["tensors"]["double"].t().contiguous().t()
    assert checksum_of(turned) == first
    for table, key, value in (
        ("numbers", "a", True),
        ("numbers", "a", 1.0),
        ("numbers", "e", [1, "y"]),
        ("tensors", "half", state["tensors"]["half"].float()),
        ("tensors", "double", state["tensors"]["double"].view(4, 3)),
        ("tensors", "empty", torch.zeros(0, 2)),
    ):
        assert checksum_of({**state, table: {**state[table], key: value}}) != first
    with pytest.raises(TypeError, match=r"Invalid value in a saved state: set\. Must be"):
        checksum_of({"a": {1, 2}})


def test_a_state_of_version_2_needs_its_checksum_and_newer_ones_are_refused() -> None:
    old = torch.load(DATA / "state_0_1_0_rank0.state", weights_only=True)["full"]["ranks"][0]
    RankState.from_dict(old)
    RankState.from_dict(with_checksum({**old, "version": 2}))
    with pytest.raises(StateMismatchError, match="damaged"):
        RankState.from_dict({**old, "version": 2})
    with pytest.raises(StateMismatchError, match=r"version 3\. Must be at most 2.*install"):
        RankState.from_dict(with_checksum({**old, "version": 3, "new": 1}))
    with pytest.raises(StateMismatchError, match="damaged"):
        RankState.from_dict({**with_checksum({**old, "version": 2}), "version": 1})


# Nothing chosen yet


def load_without_topology(rank: int, world_size: int) -> tuple[str, str]:
    _, _, state = build("abc", "gradient", topology="auto")
    saved = state.state_dict()
    del saved["topology"], saved["checksum"]
    saved |= {"version": 1, "order": {}}
    model, optimizer, again = build("abc", "gradient", topology="auto")
    again.load_state_dict(saved)
    train(model, optimizer, rank, range(2))
    return again.state_dict()["topology"], again.summary()


def test_a_state_saved_before_a_topology_was_chosen_decides_nothing() -> None:
    for chosen, summary in run_ranks(load_without_topology, 2):
        assert chosen == "sharded"
        assert "saved" not in summary.split("topology", 1)[1].splitlines()[0]
