"""Ranks that die, stop, fail, leave or differ: the others raise within seconds, and can end."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effadam_hook import attach
from effadam_hook.exchange.gloo import GlooExchange
from effadam_hook.exchange.watchdog import watchdog
from effadam_hook.session.buffers import BucketBuffers
from harness import Died, run_ranks
from training import ChosenGradients, ddp, drawn_gradients

TOPOLOGIES = ("rank0", "sharded")
PHASES = ("hook", "encode", "uplink", "reduce", "downlink", "decode")
VICTIM = 1


def backward(model: nn.Module, rank: int, step: int) -> None:
    model.zero_grad()
    model(drawn_gradients(rank, step)).backward()


def attempt(action: Callable[[], Any]) -> tuple[str, float]:
    """Run an action; return its error and the seconds it took."""
    began = time.monotonic()
    try:
        action()
    except (RuntimeError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", time.monotonic() - began


def impatient() -> None:
    watchdog.PATIENCE_S = 0.6


def at_phase(phase: str, action: Callable[[], None]) -> None:
    """Have this rank do something when bucket 1 reaches a phase for the third time."""
    seen = 0

    def counted(label: str) -> None:
        nonlocal seen
        seen += label == "bucket 1"
        if seen == 3 and label == "bucket 1":
            action()

    if phase in ("uplink", "downlink"):
        waiting_stage = {"uplink": 1, "downlink": 2}[phase]
        original = GlooExchange._run

        def run(exchange: GlooExchange, number: int, inflight: Any, job: Any) -> None:
            if number == waiting_stage:
                counted(job.label)
            original(exchange, number, inflight, job)

        GlooExchange._run = run  # type: ignore[method-assign]
        return
    name = {"hook": "load"}.get(phase, phase)
    method = getattr(BucketBuffers, name)

    def patched(buffers: BucketBuffers, *args: Any, **kwargs: Any) -> Any:
        counted(buffers.label)
        return method(buffers, *args, **kwargs)

    setattr(BucketBuffers, name, patched)


# Killed and stopped


def lose_a_rank(
    rank: int, world_size: int, folder: str, phase: str, topology: str, number: int
) -> tuple[str, float]:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=4),
    )
    pids: list[Any] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    model = ddp(ChosenGradients())
    attach(model, quantizer="lloyd3", topology=topology)
    # The server reduces in topology "rank0", so there it is the one that must be lost.
    victim = 0 if phase == "reduce" and topology == "rank0" else VICTIM
    if rank == victim:
        at_phase(phase, lambda: os.kill(os.getpid(), number))
    for step in range(2):
        backward(model, rank, step)
    result = attempt(lambda: [backward(model, rank, step) for step in range(2, 6)])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[victim], signal.SIGKILL)  # a stopped one would stay
    return result


def check_survivors(results: list[Any], within_s: float) -> None:
    survivors = [result for result in results if not isinstance(result, Died)]
    assert len(survivors) == len(results) - 1
    for message, seconds in survivors:
        assert "EffAdamError" in message or "RuntimeError" in message
        assert "Rank " in message and "bucket " in message, message
        assert any(phase in message for phase in PHASES), message
        assert seconds < within_s, message


@pytest.mark.parametrize(
    ("phase", "topology"),
    [*((phase, "sharded") for phase in PHASES), ("reduce", "rank0"), ("decode", "rank0")],
)
def test_when_a_rank_is_killed_the_others_raise_and_say_where(
    phase: str, topology: str, tmp_path: Path
) -> None:
    arguments = (str(tmp_path), phase, topology, signal.SIGKILL)
    results = run_ranks(
        lose_a_rank, 3, *arguments, backend=None, may_die={0, 1}, timeout=30, grace=15
    )
    check_survivors(results, within_s=10)


@pytest.mark.parametrize(("phase", "topology"), [("hook", "rank0"), ("decode", "sharded")])
def test_when_a_rank_is_stopped_the_others_raise_at_the_time_out_and_name_it(
    phase: str, topology: str, tmp_path: Path
) -> None:
    arguments = (str(tmp_path), phase, topology, signal.SIGSTOP)
    results = run_ranks(lose_a_rank, 3, *arguments, backend=None, may_die={1}, timeout=40, grace=20)
    check_survivors(results, within_s=12)
    assert any("No answer from rank 1" in result[0] for result in (results[0], results[2]))


def end_by_itself(rank: int, folder: str) -> None:
    """The life of a rank that ends its interpreter in the ordinary way, whatever happens."""
    importlib.import_module("torch._dynamo")  # as DDP does; it takes longer than a group waits

    (Path(folder) / f"ready{rank}").touch()
    while not all((Path(folder) / f"ready{other}").exists() for other in range(3)):
        time.sleep(0.05)
    message, _ = lose_a_rank(rank, 3, folder, "decode", "sharded", signal.SIGKILL)
    (Path(folder) / f"message{rank}").write_text(message)
    if rank == 0:
        dist.destroy_process_group()


@pytest.mark.slow
def test_survivors_shut_their_interpreters_down_at_once(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_faults_processes as t; "
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code} t.end_by_itself({rank}, {str(tmp_path)!r})"],
            env=env,
            stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]
    try:
        ends = [rank.communicate(timeout=150)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL, 0], ends
    for rank in (0, 2):
        assert "bucket" in (tmp_path / f"message{rank}").read_text()


def interrupt(rank: int, world_size: int) -> tuple[str, float]:
    model = ddp(ChosenGradients())
    attach(model, quantizer="lloyd3")
    backward(model, rank, 0)
    began = time.monotonic()
    if rank == 0:
        # The others wait inside backward for this one; Ctrl-C in a terminal reaches all of them.
        time.sleep(1.5)
        raised = attempt(lambda: signal.raise_signal(signal.SIGINT))[0]
    else:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        raised = attempt(lambda: backward(model, rank, 1))[0]
    return raised, time.monotonic() - began


def test_ctrl_c_is_heard_inside_a_backward_that_waits_for_others() -> None:
    for raised, seconds in run_ranks(interrupt, 3, timeout=30):
        assert raised.startswith("KeyboardInterrupt")
        assert seconds < 4


# Ranks that do something else


def disagree_at_run_time(
    rank: int, world_size: int, kind: str, options: dict[str, Any]
) -> tuple[str, float]:
    impatient()
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd3", **options)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1 if kind != "learning rate" else 0.1 + rank
    )
    odd = rank == VICTIM

    def train() -> None:
        for step in range(8):
            if kind == "enabled" and step == 4:
                state.enabled = not (odd ^ ("enabled" in options))
            if kind == "raises" and step == 4 and odd:
                state.session.buckets[1].encode = broken  # type: ignore[method-assign]
            if kind == "backward skipped" and step == 4 and odd:
                model.zero_grad()
                model(drawn_gradients(rank, step))
                with torch.no_grad():
                    [p.grad.add_(1) for p in model.parameters() if p.grad is not None]
                    [p.add_(1e-3) for p in model.parameters()]
                continue
            if kind == "batch skipped" and step == 4 and odd:
                continue
            if kind == "weights loaded" and step == 4 and odd:
                model.module.load_state_dict(
                    {name: w + 1 for name, w in model.module.state_dict().items()}
                )
            backward(model, rank, step)
            optimizer.step()
        if odd:
            state.close()

    return attempt(train)


def broken() -> None:
    raise OSError("no space left")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("enabled", {}, "a dense all-reduce in bucket 0"),
        ("enabled", {"topology": "sharded", "enabled": False}, "a dense all-reduce in bucket 0"),
        ("raises", {}, "Rank 1, bucket 1, encode: no space left"),
        ("raises", {"topology": "sharded"}, "Rank 1, bucket 1, encode: no space left"),
        ("backward skipped", {}, "on rank 1 and"),
        ("weights loaded", {"topology": "sharded"}, "on rank 1 and"),
        ("learning rate", {}, "on rank 1 and"),
    ],
)
def test_ranks_that_part_ways_all_raise_within_seconds_and_say_what_differs(
    kind: str, options: dict[str, Any], said: str
) -> None:
    for message, seconds in run_ranks(disagree_at_run_time, 3, kind, options, timeout=40):
        assert said in message
        expected = "EffAdamError" if kind == "raises" else "DisagreementError"
        assert message.startswith(expected), message
        assert seconds < 10


def test_a_rank_that_ends_early_is_named_by_those_that_wait_for_it() -> None:
    results = run_ranks(disagree_at_run_time, 3, "batch skipped", {}, timeout=40)
    assert results[1][0] == "no error"
    assert any("Rank 1 has ended" in results[rank][0] for rank in (0, 2))
    for message, seconds in (results[0], results[2]):
        assert "bucket 0" in message
        assert seconds < 10


def be_slow(rank: int, world_size: int) -> tuple[bool, list[str]]:
    impatient()
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("effadam_hook").addHandler(handler)
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd3")
    for step in range(4):
        if step == 2 and rank == VICTIM:
            time.sleep(5)
        backward(model, rank, step)
    return state.steps == 4, heard


def test_a_slow_rank_is_no_error_and_is_named_in_a_warning() -> None:
    results = run_ranks(be_slow, 3)
    assert all(done for done, _ in results)
    warnings = [warning for _, heard in results for warning in heard]
    # Busy machines answer late; the rank that is waited for is named either way.
    assert any("rank 1" in warning.lower() for warning in warnings)


def keep_different_replicas(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd3")
    state.check_replicas = False
    with torch.no_grad():
        [p.add_(rank) for p in model.parameters()]
    return attempt(lambda: [backward(model, rank, step) for step in range(3)])[0]


def test_the_comparison_of_replicas_can_be_switched_off() -> None:
    assert run_ranks(keep_different_replicas, 2) == ["no error"] * 2


def go_on_after_an_error(rank: int, world_size: int) -> list[str]:
    model = ddp(ChosenGradients())
    state = attach(model)
    backward(model, rank, 0)
    backward(model, rank, 1)
    if rank == VICTIM:
        state.session.buckets[1].decode = broken  # type: ignore[method-assign]
    return [attempt(lambda n=n: backward(model, rank, n))[0] for n in (2, 3, 4, 5)]


def test_training_on_after_an_error_only_repeats_that_the_exchange_has_stopped() -> None:
    for messages in run_ranks(go_on_after_an_error, 2, timeout=40):
        # The other rank has all it needs for the step in which this one failed.
        later = [message for message in messages if message != "no error"]
        assert len(later) >= 3
        for message in later[1:]:
            assert "EffAdamError" in message
            assert "the exchange has stopped" in message
            assert "Rank 1, bucket 1, decode: no space left" in message


# Process groups that end


def train_twice(rank: int, world_size: int, folder: str) -> list[Any]:
    results = []
    for life in range(3):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/life{life}", rank=rank, world_size=world_size
        )
        model = ddp(ChosenGradients())
        attach(model, quantizer="lloyd2", topology=TOPOLOGIES[life % 2])
        for step in range(3):
            backward(model, rank, step)
        results.append([p.grad.clone() for p in model.parameters()])
        del model
        dist.destroy_process_group()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and len(own_threads()) > 0:
        time.sleep(0.1)
    return [*results, own_threads()]


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("effadam")]


def test_a_new_process_group_and_attach_in_one_process(tmp_path: Path) -> None:
    ranks = run_ranks(train_twice, 2, str(tmp_path), backend=None)
    for *lives, threads in ranks:
        assert threads == []
        for grads in lives[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads, lives[0], strict=True))


def train_many(rank: int, world_size: int) -> tuple[list[list[Tensor]], list[int]]:
    results, groups, kept = [], [], []
    for life in range(6):
        model = ddp(ChosenGradients())
        state = attach(model, quantizer="lloyd2", topology=TOPOLOGIES[life % 2])
        for step in range(3):
            backward(model, rank, step)
        results.append([p.grad.clone() for p in model.parameters()])
        groups.append(len(dist.distributed_c10d._world.pg_map))
        # In the fourth life the exchange ends on one rank only.
        if life != 3 or rank == 0:
            state.close()
        else:
            kept.append((model, state))
    return results, groups


def test_exchanges_that_follow_one_another_leave_no_group_behind() -> None:
    for results, groups in run_ranks(train_many, 3):
        assert groups == [1] * 6
        for grads in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads, results[0], strict=True))


def time_outs_of_groups(rank: int, world_size: int, folder: str) -> list[float]:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=77),
    )
    model = ddp(ChosenGradients())
    state = attach(model)
    backward(model, rank, 0)
    exchange: Any = state.session.connection.exchange
    groups = [made.group for made in exchange._groups]
    return [group.options._timeout.total_seconds() for group in groups]


def test_the_groups_of_the_stages_have_the_time_out_of_ddps(tmp_path: Path) -> None:
    assert run_ranks(time_outs_of_groups, 2, str(tmp_path), backend=None) == [[77.0, 77.0]] * 2
