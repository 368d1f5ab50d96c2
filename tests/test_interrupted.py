"""States while buckets are in flight: after a backward that an error of the model has ended."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from effadam_hook import EffAdamError, EfficientAdam, attach
from effadam_hook.config import Config
from effadam_hook.session import connection
from effadam_hook.session.session import ExchangeSession
from harness import run_ranks
from test_fsdp import Interrupted, fsdp, loss_of, mesh_of
from training import ChosenGradients, ddp, drawn_gradients

needs_fsdp = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"),
    reason="FSDP does not recover from errors",
)


class Slow:
    """Kernels that leave garbage in residuals for a while."""

    name = "slow"

    def __init__(self, kernels: Any, seconds: float) -> None:
        self._kernels, self._seconds = kernels, seconds
        self.decode = kernels.decode

    def encode_(self, wire: Any, x: Tensor, residual: Tensor, *args: Any, **options: Any) -> None:
        self._delay(residual)
        self._kernels.encode_(wire, x, residual, *args, **options)

    def reduce_encode_(self, *args: Any, **options: Any) -> None:
        self._delay(args[4])
        self._kernels.reduce_encode_(*args, **options)

    def _delay(self, residual: Tensor) -> None:
        values = residual.clone()
        residual.fill_(torch.nan)
        time.sleep(self._seconds)
        residual.copy_(values)


def slow_down(seconds: float = 0.2) -> None:
    select = connection.select
    connection.select = lambda device: Slow(select(device), seconds)  # type: ignore[assignment]


def flatten(saved: Any) -> dict[str, Tensor]:
    """All tensors of a saved state, as local ones."""
    found: dict[str, Tensor] = {}
    for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        if isinstance(value, (dict, list)):
            found |= {f"{key}.{name}": tensor for name, tensor in flatten(value).items()}
        elif isinstance(value, Tensor):
            found[str(key)] = getattr(value, "to_local", lambda value=value: value)().clone()
    return found


def differing(first: Any, second: Any) -> list[str]:
    one, other = flatten(first), flatten(second)
    assert one.keys() == other.keys() and one
    return [key for key in one if not torch.equal(one[key], other[key])]


# DDP


def interrupt(model: Any, rank: int, step: int) -> None:
    """Run a backward that ends before its last bucket."""
    handle = model.module.weights[0].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(drawn_gradients(rank, step)).backward()
    handle.remove()


def save_in_flight(rank: int, world_size: int, mode: str) -> tuple[list[str], list[str], list[str]]:
    slow_down()
    model = ddp(ChosenGradients())
    options: dict[str, Any] = {"quantizer": "lloyd3", "topology": "sharded"}
    if mode == "clipped":
        options["optimizer"] = EfficientAdam(model.parameters(), max_grad_norm=1.0)
    state = attach(model, **options)
    for step in range(2):
        model.zero_grad()
        model(drawn_gradients(rank, step)).backward()
    before = state.state_dict()
    interrupt(model, rank, 2)
    saved = state.full_state_dict() if mode == "full" else state.state_dict()
    changed = [] if mode == "full" else differing(saved, before)
    time.sleep(1)
    later = state.full_state_dict() if mode == "full" else state.state_dict()
    late = differing(saved, later) if saved else []
    model = ddp(ChosenGradients())  # DDP does not continue after an error
    if mode == "clipped":
        options["optimizer"] = EfficientAdam(model.parameters(), max_grad_norm=1.0)
    state = attach(model, **options)
    for step in range(2):
        model(drawn_gradients(rank, step)).backward()
    interrupt(model, rank, 3)
    state.load_state_dict(before)
    time.sleep(1)
    return changed, late, differing(state.state_dict(), before)


@pytest.mark.parametrize("mode", ["gradient", "full", "clipped"])
def test_a_state_saved_or_loaded_while_buckets_are_in_flight_is_whole(mode: str) -> None:
    for changed, late, lost in run_ranks(save_in_flight, 2, mode, timeout=60):
        assert late == lost == []
        # Buckets that wait for the norm of the whole gradient have not been exchanged.
        assert any(key.startswith("worker") for key in changed) == (mode == "gradient")


# FSDP2


def model_of(quantizer: str = "lloyd3") -> tuple[Any, Any]:
    mesh = mesh_of(2, 2)
    torch.manual_seed(0)
    model: Any = Interrupted()
    for block in model.net.blocks:
        fsdp.fully_shard(block, mesh=mesh["shard"])
    fsdp.fully_shard(model, mesh=mesh["shard"])
    return model, attach(model, process_group=mesh.get_group("replicate"), quantizer=quantizer)


def interrupt_sharded(model: Any, step: int, rank: int) -> None:
    model.zero_grad()  # otherwise FSDP reads the gradients, and the hook waits
    model.interrupts = True
    with pytest.raises(KeyError):
        loss_of(model, step, rank).backward()
    model.interrupts = False
    model.reset_iter_state()
    model.zero_grad()


def save_shards_in_flight(rank: int, _: int) -> tuple[list[str], list[str], list[str], list[str]]:
    slow_down()
    model, state = model_of()
    loss_of(model, 0, rank).backward()
    before = state.state_dict()
    interrupt_sharded(model, 1, rank)
    saved = state.state_dict()
    time.sleep(1)
    late = differing(saved, state.state_dict())

    interrupt_sharded(model, 2, rank)
    state.load_state_dict(before)
    time.sleep(1)
    lost = differing(state.state_dict(), before)

    interrupt_sharded(model, 1, rank)  # and on with a dense step
    state.enabled = False
    loss_of(model, 3, rank).backward()
    state.enabled = True
    through = differing(state.state_dict(), saved)
    return differing(saved, before), late, lost, through


@needs_fsdp
def test_a_state_of_shards_in_flight_is_whole_and_dense_steps_leave_it_alone() -> None:
    for changed, *wrong in run_ranks(save_shards_in_flight, 4, timeout=100):
        assert changed and wrong == [[], [], []]


def part_ways(rank: int, _: int) -> tuple[str, float]:
    """Interrupt one replica before and the other one after the group of a block."""
    model, state = model_of()
    loss_of(model, 0, rank).backward()
    if rank >= 2:
        model.net.blocks[1].register_full_backward_hook(model._interrupt)
    interrupt_sharded(model, 1, rank)
    start = time.monotonic()
    with pytest.raises(EffAdamError) as raised:
        state.state_dict()
    return str(raised.value), time.monotonic() - start


@needs_fsdp
def test_replicas_that_were_interrupted_at_different_groups_do_not_wait_for_ever() -> None:
    for said, seconds in run_ranks(part_ways, 4, timeout=100):
        assert "state_dict()" in said and seconds < 30


# Buckets that wait for the norm of the whole gradient


def leave_waiting(rank: int, _: int) -> int:
    session = ExchangeSession(Config("lloyd4", "lloyd4"))
    session.mode.max_grad_norm = 1.0
    parameter, device = torch.zeros(40, 8), torch.device("cpu")
    session.agree(device)
    session.open(device)
    for step in range(3):
        session.begin_step()
        future = session.exchange(0, torch.ones(320), [parameter])
        if step != 1:
            session.release()
            future.wait()
    session.connection.watchdog.join()
    return len(session.connection.watchdog.record.in_flight)


def test_a_step_that_left_buckets_waiting_does_not_hold_up_the_next_one() -> None:
    assert run_ranks(leave_waiting, 2, timeout=20) == [0, 0]
