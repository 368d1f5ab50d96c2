"""Copies of objects that hold a state: they work, share nothing with the original, and start anew."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from effadam_hook import (
    EffAdamError,
    EfficientAdam,
    EfficientAdamState,
    attach,
    efficient_adam_hook,
)
from harness import run_ranks
from training import close, ddp, loss_of

MODES = ("gradient", "scaled", "precondition", "update", "auto")


def build(mode: str) -> tuple[DistributedDataParallel, Any, EfficientAdamState]:
    torch.manual_seed(0)
    model = ddp(nn.Sequential(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 5)))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"quantizer": "lloyd2", "block_size": 64, "topology": "sharded"}
    if mode == "scaled":
        options["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=4.0)
    if mode == "precondition":
        options |= {"optimizer": optimizer, "precondition": True}
    if mode == "update":
        optimizer = EfficientAdam(model.parameters(), lr=1e-3)
        options["optimizer"] = optimizer
    if mode == "auto":
        options["auto"] = True
    return model, optimizer, attach(model, **options)


def train(model: nn.Module, optimizer: Any, rank: int, steps: range) -> list[Tensor]:
    for step in steps:
        batch = torch.randn(8, 23, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: AveragedModel(model).module,
    "file": through_file,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "inside": lambda model: copy.deepcopy({"models": [nn.Sequential(model)]})["models"][0][0],
}


def copy_model(rank: int, world_size: int, mode: str, steps: int) -> list[str]:
    """Copy before or after training; the original continues as without copies."""
    done = []
    alone, alone_optimizer, _ = build(mode)
    expected = train(alone, alone_optimizer, rank, range(steps + 3))
    model, optimizer, state = build(mode)
    train(model, optimizer, rank, range(steps))
    threads = threading.active_count()
    copies = {name: make(model) for name, make in COPIES.items()}
    assert threading.active_count() == threads
    for name, other in copies.items():
        ((_, held),) = other._comm_hooks
        assert held is not state and held.is_copy and not state.is_copy
        assert held.config == state.config and held.steps == 0 and held.grad_scaler is None
        assert "a copy, registered with no model" in held.summary()
        assert held.stats()["worker_residual_norm"] == 0.0
        # DDP builds the copy's reducer without the hook: it averages densely until it is attached.
        dense = ddp(copy.deepcopy(model.module))
        sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (other, dense)]
        pair = [train(m, o, rank, range(3)) for m, o in zip((other, dense), sgd, strict=True)]
        assert close(*pair), name
        assert held.steps == 0
        again = attach(other, quantizer="sign")
        train(other, sgd[0], rank, range(3))
        assert again.steps == 3 and again.stats()["worker_residual_norm"] > 0
        again.close()
        done.append(name)
    weights = train(model, optimizer, rank, range(steps, steps + 3))
    if mode != "auto":  # which measures time
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        assert state.steps == steps + 3
    return done


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_model_work_and_leave_it_alone(mode: str, steps: int) -> None:
    assert run_ranks(copy_model, 2, mode, steps, timeout=100) == [list(COPIES)] * 2


def copy_state(rank: int, world_size: int) -> list[Tensor]:
    """Register copied states, which work as new ones."""
    model, optimizer, state = build("gradient")
    train(model, optimizer, rank, range(3))
    results = []
    for made in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), copy.copy(state), None):
        torch.manual_seed(0)
        fresh = ddp(nn.Sequential(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 5)))
        one = made or EfficientAdamState(quantizer="lloyd2", block_size=64, topology="sharded")
        assert made is None or one.is_copy
        fresh.register_comm_hook(one, efficient_adam_hook)
        sgd = torch.optim.SGD(fresh.parameters(), lr=0.1)
        results.append(train(fresh, sgd, rank, range(4)))
        assert not one.is_copy and one.steps == 4
        assert "a copy" not in one.summary()
        one.state_dict()
    for weights in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(weights, results[-1], strict=True))
    return results[0]


def test_a_copied_state_registered_anew_is_a_new_state() -> None:
    first, second = run_ranks(copy_state, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_copy_keeps_options_and_needs_no_process_group() -> None:
    state = EfficientAdamState(
        worker_quantizer="sign", topology="auto", exact=["1d", "<99", "*.norm*"], enabled=False
    )
    state.check_replicas = False
    other = pickle.loads(pickle.dumps(copy.deepcopy(state)))
    assert other.config == state.config
    assert other.is_copy and not other.enabled and not other.check_replicas
    assert other.stats() == state.stats()


def copy_without_group(rank: int, world_size: int) -> str:
    group = torch.distributed.new_group([0, 1])
    state = EfficientAdamState(process_group=group)
    model = ddp(nn.Linear(9, 9), process_group=group)
    model.register_comm_hook(copy.deepcopy(copy.deepcopy(state)), efficient_adam_hook)
    with pytest.raises(EffAdamError, match="pass the group") as caught:
        model(torch.ones(3, 9)).sum().backward()
    bound = copy.deepcopy(state)
    again = ddp(nn.Linear(9, 9), process_group=group)
    again.register_comm_hook(bound, efficient_adam_hook)
    bound.bind(again.module.named_parameters(), group)
    again(torch.ones(3, 9)).sum().backward()
    return str(caught.value)


def test_a_copy_does_not_take_another_group_silently() -> None:
    run_ranks(copy_without_group, 2)


def copy_without_nodes(rank: int, world_size: int) -> None:
    numbers = copy.deepcopy(EfficientAdamState(device_mesh=(2, 2)))
    model = ddp(nn.Linear(9, 9))
    model.register_comm_hook(numbers, efficient_adam_hook)
    model(torch.ones(3, 9)).sum().backward()
    assert "hierarchical, chosen" in numbers.summary()
    nodes = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    lacking = copy.deepcopy(EfficientAdamState(intra_node_group=nodes[rank // 2]))
    with pytest.raises(EffAdamError, match="copy of a state with intra_node_group or device_mesh"):
        lacking.bind(model.module.named_parameters(), torch.distributed.group.WORLD)


def test_a_copy_keeps_the_nodes_or_says_that_it_lacks_them() -> None:
    run_ranks(copy_without_nodes, 4)
