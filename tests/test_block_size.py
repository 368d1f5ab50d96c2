"""The block size: a rule about the rows of the model, an option, or that of a loaded state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effadam_hook import DisagreementError, EfficientAdamState, attach
from effadam_hook.config import Config
from effadam_hook.feedback.parameters import ParameterTable
from effadam_hook.hook import efficient_adam_hook
from effadam_hook.planner.cluster import Cluster, Link
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import predict
from effadam_hook.planner.traffic import ParameterSize, block_size_of, payload_bytes
from effadam_hook.wire.blocks import block_size_for
from harness import run_ranks
from training import ChosenGradients, ddp

ROWS_OF_128 = ((64, 128), (128,), (96, 128), (40, 512))


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([], 256),
        ([(128, 1000)], 128),
        ([(192, 1000)], 192),
        ([(200, 1000)], 200),
        ([(640, 1000)], 160),
        ([(768, 1000), (4096, 9000)], 256),
        ([(1600, 1000)], 256),  # 200 would save less than a thirty-second of a bit
        ([(64, 100), (512, 9900)], 256),  # few elements do not decide
        ([(64, 9900), (512, 100)], 64),
        ([(9, 1000)], 256),  # shorter than any block
    ],
)
def test_rows_decide_about_blocks(rows: list[tuple[int, int]], size: int) -> None:
    assert block_size_for(rows) == size


def test_rows_are_those_of_quantized_parameters_in_memory() -> None:
    table = ParameterTable()
    last = nn.Parameter(torch.zeros(8, 5, 3, 2).to(memory_format=torch.channels_last))
    shapes: dict[str, Any] = {
        "matrix": nn.Parameter(torch.zeros(7, 11)),
        "transposed": nn.Parameter(torch.zeros(7, 11).t()),
        "positions": nn.Parameter(torch.zeros(1, 4, 6)),
        "last": last,
        "bias": nn.Parameter(torch.zeros(9)),
        "exact.weight": nn.Parameter(torch.zeros(3, 3)),
    }
    table.bind(shapes.items())
    rows = table.rows(Config(exact=("1d", "exact.*")))
    assert rows == [(11, 77), (11, 77), (6, 24), (30, 240)]


def test_the_planner_chooses_the_blocks_of_the_exchange() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 24, 3), nn.Linear(192, 50), nn.LayerNorm(50), nn.Linear(50, 9)
    )
    table = ParameterTable()
    table.bind(model.named_parameters())
    sizes = [ParameterSize(p.numel(), p.shape[0] if p.ndim > 1 else 0) for p in model.parameters()]
    assert block_size_of(sizes) == block_size_for(table.rows(Config())) == 192
    # Three of four chunks of the whole payload, up and down.
    bucket = list(reversed(sizes))
    payload = payload_bytes(bucket, "lloyd2", 4, block_size=192)
    busiest = predict(Method.parse("lloyd2@25"), sizes, Cluster(4, Link(1e9, efficiency=1.0)))
    assert busiest.busiest_bytes == 2 * payload * 3 / 4 != 1.5 * payload_bytes(bucket, "lloyd2", 4)


def _step(model: Any, seed: int, shapes: Any = ROWS_OF_128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Every other row is a thousand times smaller, as tokens are that the batch lacks.
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    for gradient in gradients:
        gradient[1::2] *= 1e-3
    model.zero_grad()
    model(gradients).backward()
    return gradients


def _exchange(rank: int, world_size: int, options: dict[str, Any], by_hand: bool) -> Any:
    model = ddp(ChosenGradients(ROWS_OF_128))
    if by_hand:
        state = EfficientAdamState(quantizer="lloyd2", **options)
        model.register_comm_hook(state, efficient_adam_hook)
    else:
        state = attach(model, quantizer="lloyd2", **options)
    sent = _step(model, seed=5)
    got = [p.grad.clone() for p in model.parameters()]
    small = [(a - b)[1::2].norm() / b[1::2].norm() for a, b in zip(got, sent, strict=True)]
    summary = state.summary()
    state.close()
    return got, float(small[0]), summary


def test_small_rows_next_to_large_ones_keep_their_gradients() -> None:
    (got, small, summary), (other, *_) = run_ranks(_exchange, 2, {}, False)
    assert "blocks of 128, by the model's rows; scale" in summary
    assert small < 0.6
    assert all(map(torch.equal, got, other))
    explicit, _, summary = run_ranks(_exchange, 2, {"block_size": 128}, False)[0]
    assert all(map(torch.equal, got, explicit))
    assert "blocks of 128; scale" in summary
    _, small, summary = run_ranks(_exchange, 2, {}, True)[0]
    assert "blocks of 256, as the model's rows are not known without attach(); scale" in summary
    assert small > 5


def _resume(rank: int, world_size: int, options: dict[str, Any]) -> tuple[bool, str, str]:
    def build(**blocks: Any) -> tuple[Any, EfficientAdamState]:
        model = ddp(ChosenGradients(ROWS_OF_128))
        return model, attach(model, quantizer="lloyd2", **options, **blocks)

    model, state = build(block_size=256)
    for step in range(3):
        _step(model, seed=10 * step + rank)
    saved = state.state_dict()
    _step(model, seed=77 + rank)
    expected = [p.grad.clone() for p in model.parameters()]
    state.close()
    model, state = build()
    before = state.summary()
    state.load_state_dict(saved)
    _step(model, seed=77 + rank)
    same = all(
        torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True)
    )
    after = state.summary()
    state.close()
    return same, before, after


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {"topology": "sharded"}), (4, {"topology": "hierarchical", "device_mesh": (2, 2)})],
)
def test_a_saved_run_continues_with_its_blocks(world_size: int, options: dict[str, Any]) -> None:
    for same, before, after in run_ranks(_resume, world_size, options):
        assert same
        assert "blocks of 128, by the model's rows" in before
        assert "blocks of 256, as the saved state" in after


def _load_apart(rank: int, world_size: int) -> str:
    saved = []
    for size in (128, 256):
        model = ddp(ChosenGradients(ROWS_OF_128))
        state = attach(model, quantizer="lloyd2", block_size=size, topology="sharded")
        _step(model, seed=rank)
        saved.append(state.state_dict())
        state.close()
    model = ddp(ChosenGradients(ROWS_OF_128))
    state = attach(model, quantizer="lloyd2", topology="sharded")
    state.load_state_dict(saved[rank])
    try:
        _step(model, seed=rank)
    except (DisagreementError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_ranks_that_load_different_blocks_raise_everywhere() -> None:
    for message in run_ranks(_load_apart, 2):
        assert (
            "rank 1 has sharded with blocks of 256, and rank 0 sharded with blocks of 128"
            in message
        )
