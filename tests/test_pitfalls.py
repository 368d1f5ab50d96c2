"""The pitfalls of a communication hook: those that no other file tests, and that none is without."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from effadam_hook import attach, efficient_adam_hook
from effadam_hook.exchange.topology import Topology, sharded
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients

ROOT = Path(__file__).parent.parent


def table_of_pitfalls() -> dict[int, list[tuple[str, str]]]:
    """Number of the entry to the files and names of its tests, as docs/reliability.md has it."""
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", (ROOT / "docs/reliability.md").read_text(), re.M)
    return {int(number): re.findall(r"`(\w+)::(\w+)`", tests) for number, tests in rows}


def test_every_pitfall_has_tests_and_they_exist() -> None:
    table = table_of_pitfalls()
    assert sorted(table) == list(range(1, 49))
    for number, tests in table.items():
        assert tests, f"pitfall {number} has no test"
        for file, name in tests:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in names, f"pitfall {number}: {file}::{name}"


def step(model: Any, rank: int, number: int, dtype: Any = torch.float32) -> None:
    model.zero_grad()
    model(drawn_gradients(rank, number, dtype=dtype)).backward()


def watch_what_is_sent(rank: int, world_size: int, topology: str) -> set[str]:
    model = ddp(ChosenGradients(dtype=torch.bfloat16))
    state = attach(model, topology=topology)
    step(model, rank, 0, torch.bfloat16)
    used: Topology = state.session.topology
    dtypes = set()
    for name in ("send_up", "send_down"):
        original = getattr(used, name)

        def spy(first: Any, second: Any, group: Any, original: Any = original) -> Any:
            dtypes.update((str(first.dtype), str(second.dtype)))
            return original(first, second, group)

        setattr(used, name, spy)
    step(model, rank, 1, torch.bfloat16)
    return dtypes


@pytest.mark.parametrize("topology", ["rank0", "sharded"])
def test_only_bytes_are_sent(topology: str) -> None:
    for dtypes in run_ranks(watch_what_is_sent, 2, topology):
        assert dtypes == {"torch.uint8"}


def look(rank: int, times_s: Sequence[float]) -> Callable[[Any], float]:
    """Has ranks find the times of looks at the two ways, one after the other; rank 1 is slowest."""
    found = iter(times_s if rank == 1 else [0.0] * len(times_s))
    return lambda _: next(found)


def collectives_of_a_step(
    rank: int, world_size: int, *times_s: float
) -> tuple[list[str], list[torch.Tensor], str]:
    sharded._fastest = look(rank, times_s)
    model = ddp(ChosenGradients())
    state = attach(model, topology="sharded", quantizer="lloyd2")
    step(model, rank, 0)
    step(model, rank, 1)
    called: list[str] = []
    for name in ("all_gather_flat", "all_to_all_flat"):
        original = getattr(sharded, name)

        def spy(*args: Any, original: Any = original) -> Any:
            called.append(original.__name__)
            return original(*args)

        setattr(sharded, name, spy)
    step(model, rank, 2)
    return called, [p.grad.clone() for p in model.parameters()], state.summary()


def test_results_go_around_a_ring_to_near_ranks_and_straight_to_far_ones() -> None:
    # Gloo's all-gather is a ring: over a link of 20 ms it makes a step of four ranks twice as long.
    far = run_ranks(collectives_of_a_step, 3, 0.082, 0.041)
    near = run_ranks(collectives_of_a_step, 3, 0.0411, 0.041)
    for (straight, here, said), (around, there, _) in zip(far, near, strict=True):
        assert len(straight) == len(around) >= 6
        assert set(straight) == {"all_to_all_flat"}
        assert len(set(around)) == 2
        assert "downlinks straight: an empty one takes 82.00 ms around a ring, 41.00 ms" in said
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def route_found(rank: int, world_size: int, *times_s: float) -> tuple[bool, str]:
    sharded._fastest = look(rank, times_s)
    topology = sharded.Sharded(rank, world_size)
    topology.measure_route(dist.group.WORLD)
    return len(topology.outgoing(torch.zeros(1, 1))) > 1, topology.route


@pytest.mark.parametrize(
    ("times_s", "straight", "said"),
    [
        ((0.0080, 0.001, 0.0018, 0.001, 0.0012, 0.002), False, "1.20 ms around a ring, 1.00"),
        ((0.0030, 0.001, 0.0028, 0.001, 0.0027, 0.001, 0.0029, 0.001), True, "2.70 ms around"),
    ],
)
def test_looks_that_say_neither_near_nor_far_are_followed_by_further_ones(
    times_s: tuple[float, ...], straight: bool, said: str
) -> None:
    for found, words in run_ranks(route_found, 3, *times_s):
        assert found == straight
        assert said in words


def shape_of_what_is_sent(rank: int, world_size: int) -> tuple[int, str]:
    model = ddp(ChosenGradients())
    state = attach(model, topology="sharded")
    step(model, rank, 0)
    return len(state.session.buckets[0].outgoing), state.summary()


def test_two_ranks_are_a_ring_and_nothing_is_measured_nor_copied() -> None:
    for copies, said in run_ranks(shape_of_what_is_sent, 2):
        assert copies == 1
        assert "around" not in said and "straight" not in said


def buffers_over_steps(rank: int, world_size: int) -> tuple[int, int]:
    model = ddp(ChosenGradients())
    state = attach(model, topology="sharded")
    seen = set()
    for number in range(6):
        step(model, rank, number)
        if number >= 2:
            seen.add(
                tuple(
                    buffer.data_ptr()
                    for plan in state.session.buckets
                    for buffer in (plan.uplink, plan.received, plan.outgoing, plan.downlink)
                )
            )
    return len(seen), len(state.session.buckets)


def test_communication_buffers_are_allocated_once_per_bucket() -> None:
    for different, buckets in run_ranks(buffers_over_steps, 2):
        assert different == 1
        assert buckets >= 3


def train_on_gpu(rank: int, world_size: int, device: str) -> list[torch.Tensor]:
    model = ddp(ChosenGradients().to(device))
    state = attach(model, quantizer="lloyd3", warmup_steps=1)
    received = []
    for number in range(6):
        state.enabled = number != 4
        model.zero_grad()
        model([g.to(device) for g in drawn_gradients(rank, number)]).backward()
        received += [p.grad.cpu().clone() for p in model.parameters()]
    return received


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "world_size"), [("nccl", 1), ("gloo", 2)])
def test_on_a_gpu_streams_are_ordered_without_waiting_and_the_result_is_the_cpus(
    backend: str, world_size: int
) -> None:
    on_gpu = run_ranks(train_on_gpu, world_size, "cuda", backend=backend, fresh=True, timeout=120)
    on_cpu = run_ranks(train_on_gpu, world_size, "cpu")
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        for a, b in zip(gpu, cpu, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-30)


def test_renamed_collectives_are_known_to_one_module() -> None:
    for path in (ROOT / "effadam_hook").rglob("*.py"):
        if path.name not in ("collectives.py", "stacks.py"):  # one calls them, one recognises them
            assert not re.search(r"all_gather_(single|into_tensor)", path.read_text()), path


def residual_dtypes(rank: int, world_size: int, dtype: torch.dtype) -> set[str]:
    model = ddp(ChosenGradients(dtype=dtype))
    state = attach(model, topology="sharded")
    step(model, rank, 0, dtype)
    saved = state.state_dict()
    return {str(v.dtype) for side in ("worker", "server") for v in saved[side].values()}


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, "torch.float32"), (torch.float16, "torch.float32")],
)
def test_residuals_of_half_precision_are_single_precision(dtype: torch.dtype, kept: str) -> None:
    for dtypes in run_ranks(residual_dtypes, 2, dtype):
        assert dtypes == {kept}


def test_ddp_can_read_the_hooks_name_and_arguments() -> None:
    assert list(inspect.signature(efficient_adam_hook).parameters) == ["state", "bucket"]
    assert efficient_adam_hook.__name__ == "efficient_adam_hook"
    assert efficient_adam_hook.__qualname__ == "efficient_adam_hook"
    annotation = inspect.signature(efficient_adam_hook).parameters["bucket"].annotation
    assert annotation is dist.GradBucket


def take_the_slot(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    model.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    try:
        attach(model)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_slot_that_is_taken_is_an_error_that_names_the_hook() -> None:
    (message,) = run_ranks(take_the_slot, 1)
    assert "<lambda>" in message
    assert "takes only one" in message


def test_shapes_are_odd_enough() -> None:
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    assert 1 in sizes
    assert any(size % 256 for size in sizes)
