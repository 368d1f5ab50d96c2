"""Hierarchical on M nodes of G ranks is "sharded" on M ranks that are fed the nodes' means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import attach
from harness import run_ranks
from training import ChosenGradients, ddp

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
    return model, optimizer, attach(model, block_size=16, **options)


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


@pytest.mark.parametrize("kind", ["gradient", "preconditioned"])
@pytest.mark.parametrize(("nodes", "local"), SIZES)
@pytest.mark.parametrize("quantizer", ["lloyd4", "lloyd2", "ternary"])
def test_it_equals_sharded_on_the_nodes_means_to_the_bit(
    quantizer: str, nodes: int, local: int, kind: str
) -> None:
    table = (interleaved if quantizer == "lloyd2" else blocks)(nodes, local)
    expected = run_ranks(train, nodes, kind, quantizer, table, True, 20)
    ranks = run_ranks(train, nodes * local, kind, quantizer, table, False, 20)
    for seen, buckets in ranks:
        assert buckets >= 3  # DDP has rebuilt its buckets
        assert equal(seen, expected[0][0])
