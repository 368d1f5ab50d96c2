"""The simulation of several workers in one process, compared with real processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from effadam_hook import EfficientAdam, attach
from harness import run_ranks
from training import ddp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from rivals import LocalSteps, PowerSGD
from simulation import Simulation, dense_mean

_WORKERS, _STEPS = 3, 9
_CASES: dict[str, dict[str, Any]] = {
    "gradient lloyd4": {"quantizer": "lloyd4", "topology": "sharded"},
    "gradient sign": {"quantizer": "sign", "topology": "rank0", "error_feedback": False},
    "preconditioned lloyd3": {"quantizer": "lloyd3", "topology": "sharded"},
    "update sign/lloyd4": {
        "worker_quantizer": "sign",
        "server_quantizer": "lloyd4",
        "topology": "sharded",
    },
    "update lloyd2, local": {"quantizer": "lloyd2", "topology": "sharded"},
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Embedding(19, 37), nn.Flatten(), nn.Linear(3 * 37, 61), nn.BatchNorm1d(61)),
        *(nn.Tanh(), nn.Linear(61, 19)),
    )


def _optimizer(case: str, parameters: Any) -> torch.optim.Optimizer:
    if case.startswith("update"):
        second_moment = "local" if case.endswith("local") else "matched"
        return EfficientAdam(parameters, 3e-3, weight_decay=0.01, second_moment=second_moment)
    return torch.optim.AdamW(parameters, lr=3e-3)


def _loss(model: nn.Module, worker: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + worker)
    tokens = torch.randint(19, (8, 4), generator=generator)
    return cross_entropy(model(tokens[:, :3]), tokens[:, 3])


def _train(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    weights = {}
    for case, options in _CASES.items():
        model = ddp(_model())
        optimizer = _optimizer(case, model.parameters())
        attached = None if case.startswith("gradient") else optimizer
        precondition = case.startswith("preconditioned")
        state = attach(model, optimizer=attached, precondition=precondition, **options)
        for step in range(_STEPS):
            optimizer.zero_grad()
            _loss(model, rank, step).backward()
            optimizer.step()
        state.close()
        weights[case] = [tensor.clone() for tensor in model.module.state_dict().values()]
    return weights


def test_a_simulation_has_the_weights_of_real_ranks_to_the_bit() -> None:
    real = run_ranks(_train, _WORKERS)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case, options in _CASES.items():
            for topology in ("rank0", "sharded"):
                simulation = Simulation(
                    _model(),
                    lambda p, case=case: [_optimizer(case, p)],
                    _WORKERS,
                    precondition=case.startswith("preconditioned"),
                    **{**options, "topology": topology},
                )
                for step in range(_STEPS):
                    simulation.step(lambda model, worker, step=step: _loss(model, worker, step))
                simulated = simulation.model.state_dict().values()
                assert all(map(torch.equal, simulated, real[case])), (case, topology)
    finally:
        torch.set_num_threads(threads)


def test_a_simulation_refuses_dense_steps() -> None:
    with pytest.raises(ValueError, match="warmup_steps: 5"):
        Simulation(_model(), lambda p: [torch.optim.SGD(p)], 2, warmup_steps=5)
    simulation = Simulation(_model(), lambda p: [EfficientAdam(p, second_moment="shared")], 2)
    with pytest.raises(ValueError, match="second_moment"):
        simulation.step(lambda model, worker: _loss(model, worker, 0))


def test_local_steps_of_period_one_with_sgd_are_dense_steps() -> None:
    def build(parameters: list[nn.Parameter]) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.1)

    dense = Simulation(_plain(), lambda p: [build(p)], _WORKERS, average=dense_mean)
    model = _plain()
    local = LocalSteps(model, build, _WORKERS, period=1)
    for step in range(3):
        for trainer in (dense, local):
            trainer.step(lambda model, worker, step=step: _loss(model, worker, step))
    for own, other in zip(model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_powersgd_keeps_what_it_does_not_send() -> None:
    shapes = [torch.Size((40, 30)), torch.Size((7,))]
    average, generator = PowerSGD(shapes, rank=2), torch.Generator().manual_seed(0)
    given = sent = torch.zeros(1207)
    for _ in range(30):
        gradients = [torch.randn(1207, generator=generator) for _ in range(3)]
        given = given + torch.stack(gradients).mean(0)
        average(gradients)
        sent = sent + gradients[0]
    kept = torch.stack(average.errors).mean(0)
    torch.testing.assert_close(sent + kept, given, rtol=0, atol=1e-4)
    assert torch.equal(kept[1200:], torch.zeros(7))  # the vector is not compressed


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(19, 8), nn.Flatten(), nn.Linear(24, 19))
