"""Update mode with nodes as workers: moments of shares, dense steps, checkpoints.

The first file of the topology, ``test_hierarchical.py``, compares update mode with "sharded" over
rebuilt buckets.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import EffAdamError, EfficientAdam, EfficientAdamState, attach
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients

Nodes = tuple[tuple[int, ...], ...]
TWO_BY_TWO = ((0, 1), (2, 3))
MIXED = ((0, 2), (1, 3))
THREE_BY_TWO = ((0, 3), (1, 4), (2, 5))
Used = frozenset[int]


class Parts(nn.Module):
    """Parameters whose gradients the caller chooses; a parameter can be unused."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(s)) for s in SHAPES)

    def forward(self, gradients: list[Tensor | None]) -> Tensor:
        pairs = zip(self.weights, gradients, strict=True)
        return torch.stack([(w * g).sum() for w, g in pairs if g is not None]).sum()


def options_for(nodes: Nodes | None, **options: Any) -> dict[str, Any]:
    if nodes is None:
        return {"topology": "sharded", **options}
    mesh = DeviceMesh("cpu", torch.tensor(nodes))
    return {"topology": "hierarchical", "device_mesh": mesh, **options}


def build(
    nodes: Nodes | None, module: nn.Module | None = None, **options: Any
) -> tuple[Any, EfficientAdam, EfficientAdamState]:
    chosen = ChosenGradients() if module is None else module
    model = ddp(chosen, find_unused_parameters=module is not None)
    own = list(model.parameters())
    settings = options.pop("settings", {"second_moment": "local"})
    optimizer = EfficientAdam(
        [{"params": own[::2], "weight_decay": 0.1}, {"params": own[1::2], "lr": 2e-3}],
        lr=1e-2,
        **settings,
    )
    options = {"quantizer": "lloyd2", "block_size": 16, **options_for(nodes, **options)}
    return model, optimizer, attach(model, optimizer=optimizer, **options)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Dense steps, unused parameters, accumulation


def given(rank: int, step: int) -> list[Tensor | None]:
    """Gradients that a mean of four represents; some ranks do not use some parameters."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn: list[Tensor | None] = [
        torch.randint(-(1 << 8), 1 << 8, shape, generator=generator).float() * 2.0**-16
        for shape in SHAPES
    ]
    if step % 4 == 1:
        drawn[0] = None  # unused on all ranks
    if step % 4 == 2 and rank in MIXED[0]:
        drawn[3] = None  # on one node
    if step % 4 == 3 and rank == 3:
        drawn[7] = None  # on one rank
    return drawn


def given_to(ranks: Sequence[int], step: int) -> list[Tensor | None]:
    """The mean of some ranks' gradients; None where none of them uses the parameter."""
    means: list[Tensor | None] = []
    for of_one in zip(*(given(rank, step) for rank in ranks), strict=True):
        used = [g for g in of_one if g is not None]
        means.append(torch.stack(used).sum(0) / len(ranks) if used else None)
    return means


def eventful(
    rank: int, world_size: int, flat: bool, second_moment: str
) -> list[tuple[list[Tensor], list[int]]]:
    """A warm-up, unused parameters, accumulated gradients, and dense steps in between."""
    settings = {"second_moment": second_moment, "refresh_every": 3}
    nodes = None if flat else MIXED
    model, optimizer, state = build(nodes, Parts(), warmup_steps=2, settings=settings)
    ranks = MIXED[rank] if flat else (rank,)
    history = []
    for step in range(18):
        state.enabled = step not in (6, 7, 12)
        optimizer.zero_grad(set_to_none=step % 5 != 0)
        if step in (5, 12, 13):
            with model.no_sync():
                model(given_to(ranks, 100 + 4 * step)).backward()
        model(given_to(ranks, step)).backward()
        optimizer.step()
        steps = [int(optimizer.state[p].get("step", 0)) for p in model.parameters()]
        history.append((weights_of(model), steps))
    return history


@pytest.mark.parametrize("second_moment", ["local", "matched", "shared", "frozen"])
def test_dense_steps_and_unused_parameters_are_those_of_sharded(second_moment: str) -> None:
    expected = run_ranks(eventful, 2, True, second_moment)[0]
    for history in run_ranks(eventful, 4, False, second_moment):
        for step, ((got, steps), (want, want_steps)) in enumerate(
            zip(history, expected, strict=True)
        ):
            assert steps == want_steps, step
            assert equal(got, want), step


# Memory


def held(state: EfficientAdamState, optimizer: EfficientAdam) -> dict[str, int]:
    """Elements in memory, behind all views: of the moments and of the residuals."""
    moments = [
        entry[key] for entry in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    sides = {"worker": [v for _, v in state.session.worker], "moments": moments}
    sides["server"] = [v for _, v in state.session.server]
    counts = {}
    for side, views in sides.items():
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in views}
        counts[side] = sum(storages.values()) // 4
    return counts


def count(rank: int, world_size: int, nodes: Nodes | None) -> dict[str, int]:
    model, optimizer, state = build(nodes)
    for step in range(3):
        model.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    return held(state, optimizer)


def test_ranks_of_a_node_divide_residuals_and_moments_among_themselves() -> None:
    numel = sum(torch.Size(shape).numel() for shape in SHAPES)
    assert run_ranks(count, 2, None)[0] | {"server": 0} == {
        "worker": numel,
        "moments": 2 * numel,
        "server": 0,
    }
    ranks = run_ranks(count, 6, ((0, 1, 2), (3, 4, 5)))
    for node in (ranks[:3], ranks[3:]):
        assert sum(rank["worker"] for rank in node) == numel
        assert sum(rank["moments"] for rank in node) == 2 * numel
        assert max(rank["worker"] for rank in node) <= 1.05 * numel / 3
    assert sum(rank["server"] for rank in ranks) == numel


# Ranks out of data


def uneven(rank: int, world_size: int, flat: bool, by_rank: Sequence[int]) -> list[Tensor]:
    model, optimizer, _ = build(None if flat else TWO_BY_TWO)
    ranks = TWO_BY_TWO[rank] if flat else (rank,)
    with model.join():
        for step in range(by_rank[ranks[0]]):
            optimizer.zero_grad()
            model(given_to(ranks, 4 * step)).backward()  # all parameters are used
            optimizer.step()
    return weights_of(model)


def test_a_node_may_run_out_of_data() -> None:
    expected = run_ranks(uneven, 2, True, (4, 4, 7, 7))[0]
    for weights in run_ranks(uneven, 4, False, (4, 4, 7, 7)):
        assert equal(weights, expected)


def test_ranks_of_a_node_may_run_out_of_data_apart() -> None:
    ranks = run_ranks(uneven, 4, False, (4, 6, 7, 3))
    assert all(equal(weights, ranks[0]) for weights in ranks)


# Values that are not finite


def poison(rank: int, world_size: int, dtype: torch.dtype) -> list[tuple[bool, bool]]:
    model = ddp(ChosenGradients(dtype=dtype))
    optimizer = EfficientAdam(model.parameters(), lr=1e-2)
    state = attach(model, optimizer=optimizer, **options_for(MIXED, quantizer="lloyd2"))
    seen = []
    for step in range(4):
        gradients = drawn_gradients(rank, step, dtype=dtype)
        if step == 2 and rank == 3:
            gradients[0][5, 7], gradients[1][2] = float("nan"), float("inf")
        optimizer.zero_grad()
        model(gradients).backward()
        arrived = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        if arrived:
            optimizer.step()
        saved = state.state_dict()
        kept = [*saved["worker"].values(), *saved["server"].values()]
        kept += [e[key] for e in saved["moments"].values() for key in ("exp_avg", "exp_avg_sq")]
        seen.append((arrived, all(bool(values.isfinite().all()) for values in kept)))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_reaches_no_moment(dtype: torch.dtype) -> None:
    for seen in run_ranks(poison, 4, dtype):
        assert seen == [(True, True)] * 2 + [(False, True), (True, True)]


# Bounded gradients


BOUND = 1e-2
"""Less than the norm of the first node's mean gradient in :func:`bounded`, more than the second's."""


def bounded(rank: int, world_size: int, flat: bool, second_moment: str) -> list[Tensor]:
    settings = {"max_grad_norm": BOUND, "second_moment": second_moment, "refresh_every": 3}
    nodes = None if flat else MIXED
    model, optimizer, _ = build(nodes, Parts(), settings=settings, quantizer="none")
    ranks = MIXED[rank] if flat else (rank,)
    for step in range(6):
        scale = 1.0 if 0 in ranks or 2 in ranks else 2.0**-12
        drawn = [drawn_gradients(one, step) for one in ranks]
        means: list[Tensor | None] = [
            scale * torch.stack(same).mean(0) for same in zip(*drawn, strict=True)
        ]
        optimizer.zero_grad()
        model(means).backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("second_moment", ["local", "shared"])
def test_the_bound_is_that_of_each_nodes_mean_gradient(second_moment: str) -> None:
    wanted = run_ranks(bounded, 2, True, second_moment)[0]
    ranks = run_ranks(bounded, 4, False, second_moment)
    for got in ranks:
        assert equal(got, ranks[0])
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


# Saved states


def go_on(rank: int, world_size: int, full: bool, interrupted: bool) -> list[Tensor]:
    model, optimizer, state = build(MIXED)
    for step in range(10):
        if step == 5 and interrupted:
            saved: list[Any] = [state.state_dict(), optimizer.state_dict()]
            if full:  # the optimizer's state is that of rank 0, which has the moments of its share
                saved = [state.full_state_dict(), optimizer.state_dict()]
                dist.broadcast_object_list(saved)
            weights = model.state_dict()
            state.close()
            model, optimizer, state = build(MIXED)
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved[1])
            state.load_state_dict(saved[0])
        optimizer.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    end = state.state_dict()
    moments = [end["moments"][name][key] for name in end["moments"] for key in ("exp_avg",)]
    return [*weights_of(model), *moments, *end["worker"].values()]


@pytest.mark.parametrize("full", [False, True])
def test_a_run_resumes_on_the_same_nodes_to_the_bit(full: bool) -> None:
    plain = run_ranks(go_on, 4, full, False)
    again = run_ranks(go_on, 4, full, True)
    assert all(equal(a, b) for a, b in zip(plain, again, strict=True))


def save_on(rank: int, world_size: int, nodes: Nodes | None, is_dense: bool) -> Any:
    model, optimizer, state = build(nodes)
    for step in range(4):
        state.enabled = not is_dense or step < 3
        optimizer.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    return state.full_state_dict()


def load_on(rank: int, world_size: int, nodes: Nodes | None, saved: Any, enabled: bool) -> Any:
    """Load, save and load again before any step, and make two steps, dense or compressed."""
    model, optimizer, state = build(nodes)
    state.load_state_dict(saved)
    again = [state.full_state_dict()]
    dist.broadcast_object_list(again)
    state.load_state_dict(again[0])
    loaded = state.state_dict()
    state.enabled = enabled
    for _step in range(2):
        optimizer.zero_grad()
        model([torch.zeros(shape) for shape in SHAPES]).backward()
        optimizer.step()
    return loaded, state.state_dict(), weights_of(model)


def moments_of(states: Sequence[Mapping[str, Any]], key: str) -> list[Tensor]:
    """The mean moments of every parameter, of each element over the ranks that hold it."""
    means = []
    for index, shape in enumerate(SHAPES):
        entries = [state["moments"][f"weights.{index}"] for state in states]
        total, holders = torch.zeros(2, torch.Size(shape).numel(), dtype=torch.float64)
        for entry in entries:
            start = entry.get("start", 0)
            total[start : start + entry[key].numel()] += entry[key].double()
            holders[start : start + entry[key].numel()] += 1
        means.append(total / holders)
    return means


@pytest.mark.parametrize(
    ("before", "after", "is_dense", "enabled"),
    [
        (TWO_BY_TWO, THREE_BY_TWO, False, True),
        (TWO_BY_TWO, None, True, True),
        (TWO_BY_TWO, None, False, True),
        (None, MIXED, False, True),
        (TWO_BY_TWO, MIXED, False, False),
    ],
)
def test_other_shapes_keep_the_mean_moments(
    before: Nodes | None, after: Nodes | None, is_dense: bool, enabled: bool
) -> None:
    def size(nodes: Nodes | None) -> int:
        return 3 if nodes is None else sum(map(len, nodes))

    saved = run_ranks(save_on, size(before), before, is_dense)[0]
    ranks = run_ranks(load_on, size(after), after, saved, enabled)
    assert all(equal(weights, ranks[0][2]) for _, _, weights in ranks)
    for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        means = moments_of(saved["ranks"], key)
        again = moments_of([first for first, _, _ in ranks], key)
        later = moments_of([last for _, last, _ in ranks], key)
        for mean, loaded, decayed in zip(means, again, later, strict=True):
            assert (loaded - mean).abs().max() <= 1e-6 * mean.abs().max()
            assert (decayed - beta**2 * mean).abs().max() <= 1e-6 * mean.abs().max()


def continue_alone(rank: int, world_size: int, enabled: bool) -> str:
    """Load rank 0's optimizer state on all ranks, without the state of the hook."""
    model, optimizer, state = build(TWO_BY_TWO)
    for step in range(2):
        optimizer.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    saved = [optimizer.state_dict()]
    dist.broadcast_object_list(saved)
    optimizer.load_state_dict(saved[0])
    state.enabled = enabled
    optimizer.zero_grad()
    with pytest.raises(EffAdamError) as caught:
        model(drawn_gradients(rank, 2)).backward()
    return str(caught.value)


@pytest.mark.parametrize("enabled", [True, False])
def test_another_ranks_moments_are_an_error_on_all_ranks(enabled: bool) -> None:
    for said in run_ranks(continue_alone, 4, enabled):
        assert "Rank " in said and "this rank needs those of" in said
        assert "Load the state of the hook after it" in said


def save_alone(rank: int, world_size: int, nodes: Nodes | None, saves_hook: bool) -> list[str]:
    """Save the optimizer after compressed steps, after a dense one, and after loading."""
    model, optimizer, state = build(nodes)
    said = []
    for enabled in (True, True, False):
        state.enabled = enabled
        optimizer.zero_grad()
        model(drawn_gradients(rank, 0)).backward()
        optimizer.step()
        if saves_hook:
            state.full_state_dict()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.state_dict()
        said.append("".join(str(one.message) for one in caught))
    return said


def test_an_optimizer_saved_without_the_hook_warns_that_moments_are_missing() -> None:
    for compressed, again, dense in run_ranks(save_alone, 4, MIXED, False):
        assert compressed == again and dense == ""
        assert "the moments of one rank's share, 1/2 of them" in compressed
        assert "call full_state_dict() on all ranks" in compressed
    assert run_ranks(save_alone, 4, MIXED, True) == [["", "", ""]] * 4
    assert run_ranks(save_alone, 2, None, False) == [["", "", ""]] * 2


def reload_on(rank: int, world_size: int, who: Sequence[int]) -> list[Tensor]:
    model, optimizer, state = build(TWO_BY_TWO)
    for step in range(8):
        if step == 5 and rank in who:  # by now the ranks of a node share memory
            state.load_state_dict(state.state_dict())
        optimizer.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("who", [(1,), (0, 1, 2, 3)])
def test_ranks_that_load_a_state_keep_the_memory_of_their_node(who: Sequence[int]) -> None:
    plain, loaded = (run_ranks(reload_on, 4, ranks, timeout=60) for ranks in ((), who))
    assert all(equal(a, b) for a, b in zip(plain, loaded, strict=True))
