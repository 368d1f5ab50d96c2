"""Hierarchical on M nodes of G ranks is "sharded" on M ranks that are fed the nodes' means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import DisagreementError, EfficientAdam, attach
from effadam_hook.errors import StateMismatchError
from effadam_hook.wire import parts
from harness import run_ranks
from training import SHAPES as ALL_SHAPES
from training import (
    ChosenGradients,
    close,
    ddp,
    drawn_gradients,
    gradients_of,
    loss_of,
    mean_of,
    train_mlp,
)

SHAPES = ((37, 53), (53,), (1,), (61, 11), (7, 3, 5), (2, 259), (64, 40))
SIZES = ((2, 2), (3, 2), (2, 3))
Nodes = tuple[tuple[int, ...], ...]


def blocks(nodes: int, local: int) -> Nodes:
    """Nodes whose ranks are neighbours."""
    return tuple(tuple(range(m * local, (m + 1) * local)) for m in range(nodes))


def interleaved(nodes: int, local: int) -> Nodes:
    """Nodes whose ranks are as far from one another as possible."""
    return tuple(tuple(range(m, nodes * local, nodes)) for m in range(nodes))


def given(rank: int, step: int) -> list[Tensor]:
    """Gradients that are whole multiples of a power of two."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [
        torch.randint(-(1 << 12), 1 << 12, shape, generator=generator).float()
        * 2.0 ** (-16 - index)
        for index, shape in enumerate(SHAPES)
    ]


def node_mean(ranks: Sequence[int], step: int) -> list[Tensor]:
    every = [given(rank, step) for rank in ranks]
    return [torch.stack(of_one).sum(0) / len(ranks) for of_one in zip(*every, strict=True)]


def mesh_of(nodes: Nodes) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(nodes))


def build(kind: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    model = ddp(ChosenGradients(SHAPES))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    if kind == "preconditioned":
        optimizer = torch.optim.Adam(model.parameters(), lr=2**-10, foreach=False)
        options = {**options, "optimizer": optimizer, "precondition": True}
    if kind in ("update", "shared"):
        optimizer = updating(model, second_moment="shared" if kind == "shared" else "local")
        options = {**options, "optimizer": optimizer}
    return model, optimizer, attach(model, **{"block_size": 16, **options})


def updating(model: Any, **options: Any) -> EfficientAdam:
    """An EfficientAdam with two groups of parameters."""
    own = list(model.parameters())
    groups = [
        {"params": own[::2], "weight_decay": 0.1},
        {"params": own[1::2], "lr": 2e-3, "betas": (0.8, 0.95)},
    ]
    return EfficientAdam(groups, lr=1e-2, refresh_every=3, **options)


def train(
    rank: int, world_size: int, kind: str, quantizer: str, nodes: Nodes, sharded: bool, steps: int
) -> tuple[list[Tensor], int]:
    options: dict[str, Any] = {"quantizer": quantizer, "topology": "sharded"}
    if not sharded:
        options |= {"topology": "hierarchical", "device_mesh": mesh_of(nodes)}
    model, optimizer, state = build(kind, options)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        model(node_mean(nodes[rank], step) if sharded else given(rank, step)).backward()
        seen += [p.grad.clone() for p in model.parameters()] if step < 6 else []
        optimizer.step()
    seen += [p.detach().clone() for p in model.parameters()]
    return seen, len(state.session.buckets)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


QUANTIZERS = ("lloyd4", "lloyd2", "ternary")


# A third of a mean is not representable: the dense averages of "shared" are exact between two nodes.
@pytest.mark.parametrize(
    ("quantizer", "kind", "nodes", "local"),
    [
        *((q, k, *s) for q in QUANTIZERS for k in ("gradient", "preconditioned") for s in SIZES),
        *(("lloyd2", "update", *size) for size in SIZES),
        ("sign", "shared", 2, 3),
    ],
)
def test_it_equals_sharded_on_the_nodes_means_to_the_bit(
    quantizer: str, nodes: int, local: int, kind: str
) -> None:
    table = (interleaved if quantizer == "lloyd2" else blocks)(nodes, local)
    expected = run_ranks(train, nodes, kind, quantizer, table, True, 20)
    ranks = run_ranks(train, nodes * local, kind, quantizer, table, False, 20)
    for seen, buckets in ranks:
        assert buckets >= 3  # DDP has rebuilt its buckets
        assert equal(seen, expected[0][0])


def options_for(rank: int, nodes: Nodes, **options: Any) -> dict[str, Any]:
    return {"topology": "hierarchical", "device_mesh": mesh_of(nodes), **options}


TWO_BY_TWO = ((0, 1), (2, 3))
MIXED = ((0, 2), (1, 3))


def none_is_dense(rank: int, world_size: int, nodes: Nodes) -> bool:
    model = ddp(ChosenGradients())
    attach(model, **options_for(rank, nodes, quantizer="none"))
    return all(
        close(gradients_of(model, rank, step), mean_of(step, world_size)) for step in range(4)
    )


@pytest.mark.parametrize(("nodes", "local"), SIZES)
def test_without_a_quantizer_it_is_the_dense_mean(nodes: int, local: int) -> None:
    assert all(run_ranks(none_is_dense, nodes * local, interleaved(nodes, local)))


def train_long(rank: int, world_size: int, part_numel: int) -> tuple[list[Tensor], int]:
    parts.PART_NUMEL = part_numel
    weights, state = train_mlp(
        rank, world_size, 200, options_for(rank, MIXED, quantizer="lloyd2", block_size=16)
    )
    return weights, len(state.session.buckets)


@pytest.mark.parametrize("part_numel", [parts.PART_NUMEL, 700])
def test_replicas_are_identical_after_200_steps(part_numel: int) -> None:
    ranks = run_ranks(train_long, 4, part_numel)
    assert ranks[0][1] >= 3
    assert all(equal(weights, ranks[0][0]) for weights, _ in ranks)


def whole(states: Sequence[dict[str, Any]], name: str, numel: int, side: str) -> Tensor:
    """The residuals of all ranks, each where it belongs, added up."""
    total = torch.zeros(numel, dtype=torch.float64)
    for state in states:
        if name in state[side]:
            start, share = state[f"{side}_start"][name], state[side][name].double()
            total[start : start + share.numel()] += share
    return total


def exchange(rank: int, world_size: int, nodes: Nodes, steps: int) -> tuple[list[Tensor], Any]:
    model = ddp(ChosenGradients(dtype=torch.float64))
    state = attach(model, **options_for(rank, nodes, quantizer="ternary", block_size=16))
    total = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(steps):
        model.zero_grad()
        model(drawn_gradients(rank, step, dtype=torch.float64)).backward()
        for arrived, p in zip(total, model.parameters(), strict=True):
            arrived.add_(p.grad)
    return [t.detach() for t in total], state.state_dict()


@pytest.mark.parametrize(("nodes", "local"), SIZES)
def test_nothing_is_lost(nodes: int, local: int) -> None:
    steps, world_size = 8, nodes * local
    ranks = run_ranks(exchange, world_size, interleaved(nodes, local), steps)
    states = [state for _, state in ranks]
    numels = [t.numel() for t in ranks[0][0]]
    for p, arrived in enumerate(ranks[0][0]):
        name = f"weights.{p}"
        total = arrived.flatten() + whole(states, name, numels[p], "server")
        total += whole(states, name, numels[p], "worker") / nodes
        given_ = [
            drawn_gradients(rank, step, dtype=torch.float64)[p].flatten()
            for rank in range(world_size)
            for step in range(steps)
        ]
        wanted = torch.stack(given_).sum(0) / world_size
        assert (total - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_rank_holds_its_share_of_the_residuals_only() -> None:
    numel = sum(torch.Size(shape).numel() for shape in ALL_SHAPES)
    held = [
        sum(view.numel() for view in state["worker"].values())
        for _, state in run_ranks(exchange, 4, TWO_BY_TWO, 2)
    ]
    assert held[0] + held[1] == held[2] + held[3] == numel
    assert max(held) < 0.56 * numel


def poison(rank: int, world_size: int) -> list[tuple[bool, bool, bool]]:
    model = ddp(ChosenGradients())
    state = attach(model, **options_for(rank, MIXED, quantizer="lloyd2", block_size=16))
    seen = []
    for step in range(4):
        gradients = drawn_gradients(rank, step)
        if step == 2 and rank == 3:
            gradients[0][5, 7], gradients[1][2] = float("nan"), float("inf")
        model.zero_grad()
        model(gradients).backward()
        finite = [bool(torch.isfinite(p.grad).all()) for p in model.parameters()]
        saved = state.state_dict()
        residuals = [*saved["worker"].values(), *saved["server"].values()]
        seen.append((finite[0], finite[1], all(bool(r.isfinite().all()) for r in residuals)))
    return seen


def test_a_value_that_is_not_finite_reaches_all_ranks_and_no_residual() -> None:
    for seen in run_ranks(poison, 4):
        assert seen == [(True, True, True)] * 2 + [(False, False, True), (True, True, True)]


def huge(rank: int, world_size: int) -> bool:
    model = ddp(ChosenGradients())
    attach(model, **options_for(rank, TWO_BY_TWO, quantizer="uniform8"))
    model([torch.full_like(w, 3e38) for w in model.module.weights]).backward()
    return all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_finite_gradients_stay_finite_in_the_nodes_mean() -> None:
    assert all(run_ranks(huge, 4))


def switch(rank: int, world_size: int) -> tuple[list[bool], dict[str, Any], str]:
    model = ddp(ChosenGradients())
    state = attach(model, **options_for(rank, MIXED, quantizer="lloyd2", warmup_steps=2))
    dense = []
    for step in range(8):
        state.enabled = step not in (4, 5)
        dense.append(close(gradients_of(model, rank, step), mean_of(step, world_size)))
    return dense, state.stats(), state.summary()


def test_warm_up_and_switching_use_the_dense_all_reduce() -> None:
    for dense, stats, _ in run_ranks(switch, 4):
        assert dense == [True, True, False, False, True, True, False, False]
        assert stats["steps"] == 8


def unused(rank: int, world_size: int) -> list[tuple[float, float]]:
    """Gradients of zero for one parameter: on one node in step 3, on all ranks in step 4."""
    model = ddp(ChosenGradients())
    state = attach(model, **options_for(rank, TWO_BY_TWO, quantizer="sign", block_size=16))
    norms = []
    for step in range(5):
        gradients = drawn_gradients(rank, step)
        if step == 4 or (step == 3 and rank in TWO_BY_TWO[0]):
            gradients[0].zero_()
        model.zero_grad()
        model(gradients).backward()
        saved = state.state_dict()
        norms.append(tuple(float(saved[s]["weights.0"].norm()) for s in ("worker", "server")))
        arrived = float(model.module.weights[0].grad.abs().max())
    assert arrived == 0.0
    return norms


def test_a_node_without_a_gradient_keeps_its_residual() -> None:
    ranks = run_ranks(unused, 4)
    for rank, norms in enumerate(ranks):
        workers, servers = zip(*norms, strict=True)
        assert (workers[3] == workers[2]) == (rank in TWO_BY_TWO[0])
        assert workers[4] == workers[3] and servers[4] == servers[3] and servers[3] != servers[2]


def uneven_batches(rank: int, world_size: int, nodes: Nodes) -> list[Tensor]:
    torch.manual_seed(0)
    model = ddp(torch.nn.Sequential(torch.nn.Linear(23, 61), torch.nn.Linear(61, 23)))
    state = attach(model, **options_for(rank, nodes, quantizer="lloyd2", block_size=16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(rank)
    with Join([model]):
        for _ in range(4 + 2 * (rank % 2)):
            optimizer.zero_grad()
            loss_of(model, torch.randn(8, 23, generator=data)).backward()
            optimizer.step()
    state.close()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "nodes", [TWO_BY_TWO, MIXED]
)  # half of each node ends early, or a whole one
def test_ranks_and_nodes_may_run_out_of_data(nodes: Nodes) -> None:
    ranks = run_ranks(uneven_batches, 4, nodes)
    assert all(equal(weights, ranks[0]) for weights in ranks)


def accumulate(rank: int, world_size: int) -> bool:
    model = ddp(ChosenGradients())
    attach(model, **options_for(rank, MIXED, quantizer="none"))
    with model.no_sync():
        model(drawn_gradients(rank, 0)).backward()
    model(drawn_gradients(rank, 1)).backward()
    wanted = [a + b for a, b in zip(mean_of(0, 4), mean_of(1, 4), strict=True)]
    return close([p.grad for p in model.parameters()], wanted)


def test_accumulated_gradients_are_exchanged_once() -> None:
    assert all(run_ranks(accumulate, 4))


def scale_the_loss(rank: int, world_size: int) -> float:
    """Train with a scale of 1 and with one that changes; return the relative difference."""
    totals = []
    for scales in ((1.0,) * 6, (1.0, 64.0, 64.0, 2.0, 1024.0, 1.0)):
        model = ddp(ChosenGradients())
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=True)
        options = options_for(rank, MIXED, quantizer="lloyd2", block_size=16, grad_scaler=scaler)
        attach(model, **options)
        total = 0.0
        for step, scale in enumerate(scales):
            scaler.scale(torch.zeros(()))  # before which a scaler has no scale to set
            scaler.update(scale)
            model.zero_grad()
            model([scale * g for g in drawn_gradients(rank, step)]).backward()
            total += float((model.module.weights[0].grad / scale).double().sum())
        totals.append(total)
    return abs(totals[1] - totals[0]) / abs(totals[0])


def test_residuals_follow_the_loss_scale() -> None:
    assert max(run_ranks(scale_the_loss, 4)) < 1e-6


def sub_groups(rank: int, world_size: int) -> tuple[list[bool], list[str]]:
    """Two models at once, each on four of six ranks, some of them the same ranks."""
    members = [[0, 1, 2, 3], [2, 3, 4, 5]]
    groups = [dist.new_group(ranks) for ranks in members]
    nodes = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], [2, 4], [3, 5])]
    mine = [nodes[:2], nodes[2:]]
    models, summaries = [], []
    for ranks, group, own in zip(members, groups, mine, strict=True):
        if rank not in ranks:
            models.append(None)
            continue
        node = next(g for g in own if rank in dist.get_process_group_ranks(g))
        model = ddp(ChosenGradients(), process_group=group)
        options = {"topology": "hierarchical", "intra_node_group": node, "quantizer": "none"}
        state = attach(model, process_group=group, **options)
        models.append(model)
        summaries.append(state.summary())
    right = []
    for step in range(3):
        for ranks, model in zip(members, models, strict=True):
            if model is not None:
                every = [drawn_gradients(r, step) for r in ranks]
                wanted = [sum(g / 4 for g in of_one) for of_one in zip(*every, strict=True)]
                right.append(close(gradients_of(model, rank, step), wanted))
    return right, summaries


def test_parts_of_the_world_and_several_models() -> None:
    for right, summaries in run_ranks(sub_groups, 6):
        assert all(right)
        assert all("2 nodes x 2 ranks" in summary for summary in summaries)


def drift(rank: int, world_size: int) -> str:
    """One rank changes a weight; its peers on other nodes do not, nor the rest of its node."""
    model = ddp(ChosenGradients())
    attach(model, **options_for(rank, TWO_BY_TWO, quantizer="lloyd4"))
    try:
        for step in range(60):
            gradients_of(model, rank, step)
            if step == 2 and rank in (1, 3):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1.0)
    except DisagreementError as error:
        return str(error)
    return ""


def test_ranks_of_one_node_that_drift_apart_are_found() -> None:
    for said in run_ranks(drift, 4):
        assert "drifted apart" in said
        assert "on rank 1 and 0.0 on rank 0" in said


def refuse_weights(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="quantize_weights") as caught:
        attach(model, optimizer=optimizer, quantize_weights=True, **options_for(rank, TWO_BY_TWO))
    attach(model, optimizer=optimizer, topology="sharded")  # both are still free
    return str(caught.value)


def test_quantized_weights_are_refused() -> None:
    for said in run_ranks(refuse_weights, 4):
        assert "with quantize_weights=True" in said and 'Must be topology="sharded"' in said


# Saved states


def go_on(rank: int, world_size: int, nodes: Nodes, full: bool, interrupted: bool) -> list[Tensor]:
    model, optimizer, state = build("gradient", options_for(rank, nodes, quantizer="lloyd2"))
    for step in range(12):
        if step == 6 and interrupted:
            states = [state.full_state_dict() if full else state.state_dict()]
            if full:
                dist.broadcast_object_list(states)
            weights = model.state_dict()
            state.close()
            model, optimizer, state = build(
                "gradient", options_for(rank, nodes, quantizer="lloyd2")
            )
            model.load_state_dict(weights)
            state.load_state_dict(states[0])
        optimizer.zero_grad()
        model(given(rank, step)).backward()
        optimizer.step()
    saved = state.state_dict()
    sides = [saved[side][name] for side in ("worker", "server") for name in sorted(saved[side])]
    return [*(p.detach().clone() for p in model.parameters()), *sides]


@pytest.mark.parametrize("full", [False, True])
def test_a_run_resumes_on_the_same_nodes_to_the_bit(full: bool) -> None:
    plain = run_ranks(go_on, 4, MIXED, full, False)
    again = run_ranks(go_on, 4, MIXED, full, True)
    assert all(equal(a, b) for a, b in zip(plain, again, strict=True))


def save_on(rank: int, world_size: int, nodes: Nodes | None) -> Any:
    options: dict[str, Any] = {"topology": "sharded"}
    if nodes is not None:
        options = options_for(rank, nodes)
    model, _, state = build("gradient", {"quantizer": "sign", "block_size": 64, **options})
    for step in range(4):
        model.zero_grad()
        model(given(rank, step)).backward()
    return state.full_state_dict()


def load_on(
    rank: int, world_size: int, nodes: Nodes | None, saved: Any, exact: tuple[str, ...] = ("1d",)
) -> Any:
    options: dict[str, Any] = {"topology": "sharded"}
    if nodes is not None:
        options = options_for(rank, nodes)
    options |= {"exact": exact, "block_size": 64}
    model, _, state = build("gradient", {"quantizer": "sign", **options})
    state.load_state_dict(saved)
    loaded = state.state_dict()
    model(given(rank, 4)).backward()
    return loaded


def books(states: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The workers' mean residual and the servers' of every parameter."""
    workers = len(states[0].get("nodes", states))
    held = []
    for index, shape in enumerate(SHAPES):
        numel, name = torch.Size(shape).numel(), f"weights.{index}"
        full = [{"worker_start": dict.fromkeys(s["worker"], 0), **s} for s in states]
        held.append(whole(full, name, numel, "worker") / workers)
        held.append(whole(full, name, numel, "server"))
    return held


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (TWO_BY_TWO, MIXED),
        (TWO_BY_TWO, 4),
        (TWO_BY_TWO, 2),
        (4, MIXED),
        (TWO_BY_TWO, interleaved(3, 2)),
        (blocks(2, 3), TWO_BY_TWO),
        (TWO_BY_TWO, ((0,), (1,), (2,))),
    ],
)
def test_other_shapes_keep_the_means(before: Any, after: Any) -> None:
    def size(shape: Any) -> tuple[int, Nodes | None]:
        return (shape, None) if isinstance(shape, int) else (sum(map(len, shape)), shape)

    saved = run_ranks(save_on, *size(before))[0]
    loaded = run_ranks(load_on, *size(after), saved)
    first, second = books(saved["ranks"]), books(loaded)
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_other_exact_parameters_keep_the_means() -> None:
    saved = run_ranks(save_on, 4, TWO_BY_TWO)[0]
    loaded = run_ranks(load_on, 4, TWO_BY_TWO, saved, ("<3000",))
    assert saved["ranks"][0]["worker_start"] != loaded[0]["worker_start"]
    for a, b in zip(books(saved["ranks"]), books(loaded), strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def load_elsewhere(rank: int, world_size: int) -> list[str]:
    said = []
    _, _, flat = build("gradient", {"topology": "sharded"})
    _, _, nodes = build("gradient", options_for(rank, TWO_BY_TWO))
    _, _, mixed = build("gradient", options_for(rank, MIXED))
    for source, target in ((flat, nodes), (nodes, flat), (nodes, mixed)):
        with pytest.raises(StateMismatchError) as caught:
            target.load_state_dict(source.state_dict())
        said.append(str(caught.value))
    coarse = {"block_size": 64}  # the units of exact parameters are smaller than a block
    model, _, source = build("gradient", options_for(rank, TWO_BY_TWO, **coarse))
    _, _, target = build("gradient", options_for(rank, TWO_BY_TWO, exact=("<3000",), **coarse))
    model(given(rank, 0)).backward()
    with pytest.raises(StateMismatchError) as caught:
        target.load_state_dict(source.state_dict())
    return [*said, str(caught.value)]


def test_a_ranks_own_state_fits_the_same_nodes_only() -> None:
    for said in run_ranks(load_elsewhere, 4):
        assert all("load one of all ranks from full_state_dict()" in text for text in said)
        assert "the nodes None" in said[0] and "((0, 1), (2, 3))" in said[2]
        assert "blocks of 64 and " in said[3] and "fits the same nodes, blocks and exact" in said[3]
