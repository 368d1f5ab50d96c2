"""The exchange computes what the paper's formulas say, on real ranks over several rebuilt buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effadam_hook import attach
from effadam_hook.kernels import reference
from effadam_hook.wire.layout import Slot, lay_out_bucket
from effadam_hook.wire.quantizers import QUANTIZERS, get_quantizer
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients, train_mlp

TOPOLOGIES = ("rank0", "sharded")


def quantized(x: Tensor, quantizer: str) -> Tensor:
    """Q(x) for one parameter, decoded, with blocks of 256."""
    kind = get_quantizer(quantizer)
    slot = Slot("x", 0, x.numel(), exact=False)
    wire = lay_out_bucket(
        [slot],
        uplink=kind,
        downlink=kind,
        scale_rule="least_squares",
        block_size=256,
        servers=1,
        itemsize=x.element_size(),
    ).uplink
    payload = torch.zeros(1, wire.stride_bytes, dtype=torch.uint8)
    decoded = torch.empty_like(x.flatten())
    reference.encode_(wire, x.flatten(), None, payload, x.dtype)
    reference.decode(wire, payload, decoded, x.dtype)
    return decoded.view_as(x)


def simulate(world_size: int, steps: int, quantizer: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """The two-way exchange of the paper, as written, in one process: every step's gradients."""
    worker = [[torch.zeros(s, dtype=dtype) for s in SHAPES] for _ in range(world_size)]
    server = [torch.zeros(s, dtype=dtype) for s in SHAPES]
    received = []
    for step in range(steps):
        gradients = [drawn_gradients(rank, step, dtype=dtype) for rank in range(world_size)]
        result = []
        for p, shape in enumerate(SHAPES):
            mean = torch.zeros(shape, dtype=dtype)
            for rank in range(world_size):
                if len(shape) <= 1:
                    mean += gradients[rank][p] / world_size
                    continue
                total = gradients[rank][p] + worker[rank][p]
                sent = quantized(total, quantizer)
                worker[rank][p] = total - sent
                mean += sent / world_size
            if len(shape) > 1:
                total = mean + server[p]
                mean = quantized(total, quantizer)
                server[p] = total - mean
            result.append(mean)
        received.append(result)
    return received


def exchange_chosen_gradients(
    rank: int, world_size: int, steps: int, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[list[list[Tensor]], dict[str, Any], int]:
    model = ddp(ChosenGradients(dtype=dtype))
    state = attach(model, **options)
    received = []
    for step in range(steps):
        model.zero_grad(set_to_none=True)
        model(drawn_gradients(rank, step, dtype=dtype)).backward()
        received.append([p.grad.clone() for p in model.parameters()])
    return received, state.state_dict(), len(state.session.buckets)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("quantizer", ["lloyd3", "ternary"])
def test_equals_a_simulation_of_the_formulas_to_the_bit(topology: str, quantizer: str) -> None:
    # With 2 workers dividing by their number is exact, so the order of operations cannot matter.
    options = {"quantizer": quantizer, "topology": topology}
    ranks = run_ranks(exchange_chosen_gradients, 2, 6, torch.float32, options)
    expected = simulate(2, 6, quantizer, torch.float32)
    for received, _, buckets in ranks:
        assert buckets >= 3
        for step, (got, want) in enumerate(zip(received, expected, strict=True)):
            for shape, a, b in zip(SHAPES, got, want, strict=True):
                assert torch.equal(a, b), f"step {step}, parameter {shape}"


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("quantizer", ["lloyd4", "lloyd2", "sign"])
def test_nothing_is_lost_over_50_steps_and_a_rebuild(topology: str, quantizer: str) -> None:
    """Σ_t δ̃_t + ẽ + (1/N) Σ e_i equals Σ_t (1/N) Σ g_i, in float64."""
    world_size, steps = 3, 50
    options = {"quantizer": quantizer, "topology": topology}
    ranks = run_ranks(exchange_chosen_gradients, world_size, steps, torch.float64, options)
    for p, shape in enumerate(SHAPES):
        name = f"weights.{p}"
        given = sum(
            drawn_gradients(rank, step, dtype=torch.float64)[p] / world_size
            for rank in range(world_size)
            for step in range(steps)
        )
        arrived = sum(received[p] for received in ranks[0][0]).flatten()
        for _, saved, _ in ranks:
            arrived = arrived + saved["worker"][name] / world_size
            if name in saved["server"]:
                share, start = saved["server"][name], saved["server_start"][name]
                arrived[start : start + share.numel()] += share
        scale = given.abs().max()
        assert (arrived.view(shape) - given).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_sharded_equals_rank0_to_the_bit(quantizer: str) -> None:
    results = [
        run_ranks(
            exchange_chosen_gradients, 3, 5, torch.float32, {"quantizer": quantizer, "topology": t}
        )
        for t in TOPOLOGIES
    ]
    (first, _, buckets), *others = [rank for ranks in results for rank in ranks]
    assert buckets >= 3
    for received, _, _ in others:
        for got, want in zip(received, first, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_different_quantizers_up_and_down() -> None:
    for up, down in (("none", "lloyd2"), ("lloyd2", "none"), ("sign", "uniform8")):
        options = {"worker_quantizer": up, "server_quantizer": down}
        by_topology = [
            run_ranks(exchange_chosen_gradients, 3, 3, torch.float32, {**options, "topology": t})
            for t in TOPOLOGIES
        ]
        (first, _, _), *others = [rank for ranks in by_topology for rank in ranks]
        for received, _, _ in others:
            for got, want in zip(received, first, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (up, down)


def train_and_return_weights(
    rank: int, world_size: int, steps: int, options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, float]]:
    weights, state = train_mlp(rank, world_size, steps, options)
    return weights, state.stats()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_replicas_are_bit_identical_after_200_steps(topology: str) -> None:
    ranks = run_ranks(
        train_and_return_weights, 3, 200, {"quantizer": "lloyd2", "topology": topology}
    )
    first, stats = ranks[0]
    assert stats["steps"] == 200
    for weights, _ in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, first, strict=True))


def test_without_quantization_the_gradients_are_those_of_plain_ddp() -> None:
    for received, _, _ in run_ranks(
        exchange_chosen_gradients, 2, 4, torch.float32, {"quantizer": "none"}
    ):
        for step, got in enumerate(received):
            for p, value in enumerate(got):
                mean = sum(drawn_gradients(rank, step)[p] / 2 for rank in range(2))
                assert torch.equal(value, mean)


def test_without_error_feedback_no_residual_is_kept() -> None:
    for received, saved, _ in run_ranks(
        exchange_chosen_gradients, 2, 3, torch.float32, {"error_feedback": False}
    ):
        assert not saved["worker"] and not saved["server"]
        for p, shape in enumerate(SHAPES):
            if len(shape) > 1:
                means = [quantized(drawn_gradients(r, 2)[p], "lloyd4") / 2 for r in range(2)]
                assert torch.equal(received[2][p], quantized(sum(means), "lloyd4"))


def test_one_rank_alone_is_quantized_the_same_way_both_ways() -> None:
    for topology in TOPOLOGIES:
        ((received, _, _),) = run_ranks(
            exchange_chosen_gradients, 1, 4, torch.float32, {"topology": topology}
        )
        expected = simulate(1, 4, "lloyd4", torch.float32)
        for got, want in zip(received, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
