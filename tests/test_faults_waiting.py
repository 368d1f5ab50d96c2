"""Ranks that wait outside a bucket, in another model, or in vain: all raise within seconds."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach, efficient_adam_hook
from effadam_hook.ddp import engine
from effadam_hook.exchange.watchdog import watchdog
from effadam_hook.session import buckets, connection, session
from harness import Died, run_ranks
from training import ChosenGradients, ddp, drawn_gradients

ODD = 1


def backward(model: nn.Module, rank: int, step: int) -> None:
    model.zero_grad()
    model(drawn_gradients(rank, step)).backward()


def attempt(action: Any) -> tuple[str, float]:
    began = time.monotonic()
    try:
        action()
    except BaseException as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", time.monotonic() - began


def by_hand(model: DistributedDataParallel, **options: Any) -> EfficientAdamState:
    state = EfficientAdamState(**options)
    model.register_comm_hook(state, efficient_adam_hook)
    return state


# A rank that dies before the exchange has been opened


def die_early(rank: int, world_size: int, where: str, options: dict[str, Any]) -> tuple[str, float]:
    model = ddp(ChosenGradients())
    register: Any = by_hand if where == "registered by hand" else attach
    state = register(model, **options)
    if where == "full_state_dict":
        backward(model, rank, 0)
    if rank == ODD:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "full_state_dict":
        return attempt(state.full_state_dict)
    return attempt(lambda: backward(model, rank, 0))


@pytest.mark.parametrize(
    ("where", "options", "said"),
    [
        ("first backward", {}, "opening the exchange"),
        ("first backward", {"enabled": False}, "opening the exchange"),
        ("first backward", {"topology": "auto"}, "opening the exchange"),
        ("registered by hand", {"topology": "sharded"}, "comparing options"),
        ("full_state_dict", {}, "full_state_dict()"),
    ],
)
def test_a_rank_that_dies_outside_a_bucket_is_noticed_in_seconds(
    where: str, options: dict[str, Any], said: str
) -> None:
    results = run_ranks(die_early, 3, where, options, may_die={ODD}, timeout=30, grace=15)
    assert isinstance(results[ODD], Died)
    for rank in (0, 2):
        message, seconds = results[rank]
        assert message.startswith(f"EffAdamError: Rank {rank}, "), message
        assert said in message
        assert seconds < 10


def come_late(rank: int, world_size: int, enabled: bool) -> tuple[int, list[str]]:
    watchdog.PATIENCE_S = 0.6
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("effadam_hook").addHandler(handler)
    model = ddp(ChosenGradients())
    state = attach(model, enabled=enabled)
    if rank == ODD:
        time.sleep(5)
    for step in range(2):
        backward(model, rank, step)
    return state.steps, heard


@pytest.mark.parametrize("enabled", [True, False])
def test_a_rank_that_is_slow_before_its_first_backward_is_no_error(enabled: bool) -> None:
    results = run_ranks(come_late, 3, enabled)
    assert [steps for steps, _ in results] == [2] * 3
    assert any("in opening the exchange" in text for _, heard in results for text in heard)


# Errors of the hook itself


def fail_in_hook(
    rank: int, world_size: int, where: str, is_attached: bool
) -> tuple[str, float, str]:
    model = ddp(ChosenGradients())
    state = attach(model, topology="sharded") if is_attached else by_hand(model)
    count = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal count
        count += 1
        if where == "accumulation" and count < 3:
            return None
        if where == "interrupt":
            raise KeyboardInterrupt
        raise MemoryError("no memory left")

    if rank == ODD:
        owner, name = {
            "buffers": (buckets, "BucketBuffers"),
            "kernels": (connection, "select"),
            "describe": (session.ParameterTable, "describe"),
            "load": (buckets.BucketBuffers, "load"),
            "after": (engine.AccumulationCheck, "end"),
        }.get(where, (engine.AccumulationCheck, "begin"))
        setattr(owner, name, fail)
    message, seconds = attempt(lambda: [backward(model, rank, step) for step in range(5)])
    again = attempt(lambda: backward(model, rank, 5))[0]
    if rank == ODD:
        time.sleep(6)  # it lingers, and the others must not wait for its end
    assert state.steps < 5
    return message, seconds, again


@pytest.mark.parametrize(
    ("where", "is_attached"),
    [
        *((where, True) for where in ("buffers", "kernels", "load", "accumulation", "after")),
        *((where, False) for where in ("buffers", "accumulation", "describe")),
    ],
)
def test_any_error_in_the_hook_reaches_all_ranks_and_leaves_ddp_usable(
    where: str, is_attached: bool
) -> None:
    results = run_ranks(fail_in_hook, 3, where, is_attached, timeout=40)
    for message, seconds, again in results:
        assert "no memory left" in message, message
        assert message.split(":")[0] in ("EffAdamError", "DisagreementError")
        assert seconds < 5
        assert "no memory left" in again or where == "describe", again


def test_an_interrupt_in_the_hook_is_raised_at_once_and_reported_to_the_others() -> None:
    results = run_ranks(fail_in_hook, 3, "interrupt", True, timeout=40)
    assert results[ODD][0].startswith("KeyboardInterrupt") and results[ODD][1] < 1
    for rank in (0, 2):
        assert "KeyboardInterrupt" in results[rank][0] and results[rank][1] < 5


# Several models


def cross(rank: int, world_size: int, delay_s: float) -> list[tuple[list[str], list[torch.Tensor]]]:
    watchdog.PATIENCE_S = 0.6
    groups = [dist.new_group(list(range(world_size))) for _ in range(2)]
    models = [
        DistributedDataParallel(nn.Linear(7, 5, bias=False), process_group=group)
        for group in groups
    ]
    for model in models:
        with torch.no_grad():
            model.module.weight.zero_()  # so that no difference of the weights gives it away
        attach(model, quantizer="none")
    errors: list[str] = []

    def train(which: int) -> None:
        if (which + rank) % 2:
            time.sleep(delay_s)
        for step in range(4):
            value = float((step + 1) * (rank + 1) * (100 if which else 1))
            models[which].zero_grad()
            try:
                models[which](torch.full((1, 7), value)).sum().backward()
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=train, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors, [model.module.weight.grad for model in models]  # type: ignore[return-value]


@pytest.mark.parametrize("delay_s", [0.5, 4.0])
def test_equal_models_in_threads_of_different_order_keep_to_their_own_peers(delay_s: float) -> None:
    for errors, (first, second) in run_ranks(cross, 3, delay_s, timeout=40):
        assert errors == []
        assert torch.equal(first, torch.full((5, 7), 4 * 2.0))
        assert torch.equal(second, torch.full((5, 7), 4 * 200.0))


def swap(rank: int, world_size: int, steps: int, own_groups: bool) -> tuple[str, float]:
    watchdog.PATIENCE_S = 0.6
    groups = (
        [dist.new_group(list(range(world_size))) for _ in range(3)] if own_groups else [None] * 3
    )
    models = [
        DistributedDataParallel(ChosenGradients(), process_group=group, bucket_cap_mb=0.01)
        for group in groups
    ]
    for model in models:
        attach(model, quantizer="lloyd3")
    for step in range(steps):
        for model in models:
            backward(model, rank, step)
    order = models[rank:] + models[:rank]  # every rank begins with another one
    return attempt(lambda: [backward(model, rank, steps) for model in order])


@pytest.mark.parametrize(("steps", "own_groups"), [(3, False), (0, True), (0, False)])
def test_models_taken_in_another_order_are_found_and_named_on_all_ranks(
    steps: int, own_groups: bool
) -> None:
    for message, seconds in run_ranks(swap, 3, steps, own_groups, timeout=40):
        assert message.startswith("DisagreementError"), message
        assert "in the same order on all ranks" in message
        if steps:
            assert len({n for n in "123" if f"of model {n} (with " in message}) >= 2, message
        assert seconds < 10


# Different states


def resume_elsewhere(
    rank: int, world_size: int, mode: str, options: dict[str, Any], late: bool
) -> tuple[str, float]:
    def make() -> tuple[Any, Any]:
        model = ddp(ChosenGradients())
        optimizer = EfficientAdam(model.parameters(), lr=1e-3) if mode == "update" else None
        return model, attach(model, optimizer=optimizer, quantizer="lloyd2", **options)

    model, state = make()
    saved = {}
    for step in range(5):
        saved[step] = state.state_dict()
        backward(model, rank, step)
    if not late:
        model, state = make()
    state.load_state_dict(saved[4 if rank == ODD else 2])
    return attempt(lambda: [backward(model, rank, step) for step in range(3)])


@pytest.mark.parametrize(
    ("mode", "options", "late"),
    [
        ("gradient", {"topology": "sharded"}, False),
        ("update", {}, False),
        ("gradient", {"enabled": False}, False),
        ("gradient", {}, True),
        ("update", {"topology": "sharded"}, True),
    ],
)
def test_ranks_that_continue_from_different_steps_all_raise(
    mode: str, options: dict[str, Any], late: bool
) -> None:
    for message, seconds in run_ranks(resume_elsewhere, 3, mode, options, late, timeout=40):
        assert message.startswith("DisagreementError"), message
        assert "rank 1 is at step 4 and rank 0 at step 2" in message
        assert seconds < 8


def count_otherwise(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), lr=1e-3)
    state = attach(model, optimizer=optimizer)
    state.check_replicas = False
    backward(model, rank, 0)
    if rank != ODD:
        optimizer.step()
    return attempt(lambda: [backward(model, rank, step) for step in range(1, 3)])[0]


def test_optimizers_that_count_different_steps_are_found_in_update_mode() -> None:
    for message in run_ranks(count_otherwise, 3, timeout=40):
        assert "the optimizer of rank 1 counts other steps than that of rank 0" in message


# A rank that is through


def finish_early(rank: int, world_size: int, what: str) -> tuple[str, float]:
    watchdog.PATIENCE_S = 0.6
    model = ddp(ChosenGradients())
    state = attach(model)
    group = dist.new_group([0, 1, 2])
    for step in range(3 if rank == ODD else 5):
        if step == 3:
            return attempt(lambda: backward(model, rank, 3))

        backward(model, rank, step)
    return attempt(
        {
            "barrier": lambda: dist.barrier(group),
            "all_reduce": lambda: dist.all_reduce(torch.ones(3)),
            "broadcast": lambda: dist.broadcast_object_list([None], src=0),
            "all_gather_object": lambda: dist.all_gather_object([None] * 3, 1),
            "full_state_dict": state.full_state_dict,
        }[what]
    )


@pytest.mark.parametrize(
    "what", ["barrier", "all_reduce", "broadcast", "all_gather_object", "full_state_dict"]
)
def test_a_rank_that_is_through_and_waits_in_another_collective_is_an_error(what: str) -> None:
    results = run_ranks(finish_early, 3, what, timeout=40)
    for rank, (message, seconds) in enumerate(results):
        assert seconds < 10
        if rank != ODD:
            assert "wait for one another for ever" in message, message
            assert what in message or what == "all_gather_object"
            assert "test_faults_waiting.py:" in message or what == "full_state_dict"
        else:
            assert message != "no error"


def validate_slowly(rank: int, world_size: int) -> str:
    watchdog.PATIENCE_S = 0.6
    model = ddp(ChosenGradients())
    attach(model)

    def train() -> None:
        for epoch in range(2):
            for step in range(2):
                backward(model, rank, step)
            if rank == 0:
                time.sleep(4)
            dist.barrier()
            if rank == ODD and epoch == 0:
                time.sleep(4)  # the others wait for it in a bucket, and it was in a barrier before

    return attempt(train)[0]


def test_a_slow_validation_or_slow_data_is_no_error() -> None:
    assert run_ranks(validate_slowly, 3, timeout=40) == ["no error"] * 3


def wait_within_bounds(rank: int, world_size: int) -> tuple[str, float]:
    model = ddp(ChosenGradients())
    state = attach(model, wait_timeout_s=60.0)
    for step in range(3):  # DDP waits in forward, where it rebuilds its buckets
        backward(model, rank, step)
    state.wait_timeout_s = 1.5
    if rank == ODD:
        time.sleep(7)
    return attempt(lambda: backward(model, rank, 3))


def test_a_bound_on_waiting_can_be_set_and_says_who_is_late() -> None:
    results = run_ranks(wait_within_bounds, 3, timeout=40)
    assert all("wait_timeout_s=1.5" in message for message, _ in results), results
    assert any("Rank 1 has started" in message for message, _ in results)
    assert all(results[rank][1] < 6.5 for rank in (0, 2))


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-1.0, ValueError), ("5", TypeError)])
def test_a_bound_on_waiting_must_be_a_positive_number(value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="Invalid wait_timeout_s"):
        EfficientAdamState(wait_timeout_s=value)
