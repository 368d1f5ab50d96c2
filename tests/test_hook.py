"""The hook in the ways DDP is used: registration, switching, accumulation, every DDP option."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import (
    DisagreementError,
    EffAdamError,
    EfficientAdamState,
    attach,
    efficient_adam_hook,
)
from effadam_hook.wire import parts
from harness import run_ranks
from training import (
    SHAPES,
    ChosenGradients,
    close,
    ddp,
    drawn_gradients,
    gradients_of,
    loss_of,
    mean_of,
    train_mlp,
)


def switch_and_warm_up(rank: int, world_size: int) -> dict[str, Any]:
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd2", warmup_steps=2, enabled=True)
    dense = []
    for step in range(8):
        state.enabled = step not in (4, 5)
        dense.append(close(gradients_of(model, rank, step), mean_of(step, world_size)))
    return {"dense": dense, "stats": state.stats(), "summary": state.summary()}


def test_warm_up_and_switching_use_the_dense_all_reduce() -> None:
    numel = sum(torch.Size(s).numel() for s in SHAPES)
    for result in run_ranks(switch_and_warm_up, 3):
        assert result["dense"] == [True, True, False, False, True, True, False, False]
        stats = result["stats"]
        assert stats["steps"] == 8
        assert stats["dense_bytes"] == 8 * 2 * 4 * numel
        assert stats["uplink_bytes"] == stats["downlink_bytes"] < 4 * 4 * numel + 4 * numel
        assert "lloyd2" in result["summary"] and "exact        3 of 8" in result["summary"]


def run_the_reference(rank: int, world_size: int) -> str:
    os.environ["EFFADAM_KERNELS"] = "reference"
    model = ddp(ChosenGradients())
    state = attach(model)
    gradients_of(model, rank, 0)
    return state.summary()


def test_the_summary_says_why_the_reference_runs() -> None:
    (summary,) = run_ranks(run_the_reference, 1)
    assert "  kernels      reference (set by EFFADAM_KERNELS)\n" in summary


def register_by_hand(rank: int, world_size: int) -> list[list[Tensor]]:
    results = []
    for by_hand in (True, False):
        model = ddp(ChosenGradients())
        if by_hand:
            state = EfficientAdamState(quantizer="lloyd3")
            model.register_comm_hook(state, efficient_adam_hook)
        else:
            attach(model, quantizer="lloyd3")
        results.append([g for step in range(4) for g in gradients_of(model, rank, step)])
    return results


def test_registering_by_hand_equals_attach() -> None:
    for by_hand, attached in run_ranks(register_by_hand, 2):
        assert all(torch.equal(a, b) for a, b in zip(by_hand, attached, strict=True))


def train_with(
    rank: int,
    world_size: int,
    hook_options: dict[str, Any],
    ddp_options: dict[str, Any],
    part_numel: int = parts.PART_NUMEL,
) -> tuple[list[Tensor], int, dict[str, float]]:
    parts.PART_NUMEL = part_numel
    weights, state = train_mlp(rank, world_size, 12, hook_options, ddp_options)
    return weights, len(state.session.buckets), state.stats()


@pytest.mark.parametrize("topology", ["rank0", "sharded"])
def test_large_buckets_come_in_parts_with_the_same_result(topology: str) -> None:
    hook_options = {"quantizer": "lloyd2", "topology": topology}
    whole = run_ranks(train_with, 3, hook_options, {"bucket_cap_mb": 25})
    parts = run_ranks(train_with, 3, hook_options, {"bucket_cap_mb": 25}, 1500)
    assert whole[0][1] == 1 and parts[0][1] >= 3
    for weights, _, _ in parts:
        assert all(torch.equal(a, b) for a, b in zip(weights, whole[0][0], strict=True))


@pytest.mark.parametrize("topology", ["rank0", "sharded"])
def test_ddp_options_change_nothing_in_the_result(topology: str) -> None:
    hook_options = {"quantizer": "lloyd3", "topology": topology}
    plain = run_ranks(train_with, 3, hook_options, {})
    assert plain[0][1] >= 3
    for option in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters"):
        ranks = run_ranks(train_with, 3, hook_options, {option: True})
        for weights, buckets, stats in ranks:
            assert buckets >= 3
            assert stats["steps"] == 12
            assert all(torch.equal(a, b) for a, b in zip(weights, plain[0][0], strict=True)), option


def accumulate(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor], float]:
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="none")
    model.zero_grad()
    with model.no_sync():
        model(drawn_gradients(rank, 0)).backward()
    model(drawn_gradients(rank, 1)).backward()
    wanted = [a + b for a, b in zip(mean_of(0, world_size), mean_of(1, world_size), strict=True)]
    return [p.grad.clone() for p in model.parameters()], wanted, state.stats()["steps"]


def test_no_sync_exchanges_once_for_the_sum() -> None:
    for got, wanted, steps in run_ranks(accumulate, 2):
        assert close(got, wanted)
        assert steps == 1


class TwentyLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(33, 33) for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def soak(rank: int, world_size: int, topology: str) -> tuple[list[Tensor], int, Any]:
    torch.manual_seed(0)
    model = ddp(TwentyLayers())
    state = attach(model, quantizer="lloyd3", topology=topology)
    jitter = torch.Generator().manual_seed(100 + rank)
    for name in ("encode", "reduce", "decode"):
        delay_calls(name, jitter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(rank)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(model, torch.randn(4, 33, generator=data)).backward()
        optimizer.step()
        if torch.rand((), generator=jitter) < 0.1:
            time.sleep(0.003)
    return (
        [p.detach() for p in model.parameters()],
        len(state.session.buckets),
        state.stats()["steps"],
    )


def delay_calls(name: str, jitter: torch.Generator) -> None:
    """Make a phase of every bucket take up to a millisecond longer, differently on each rank."""
    from effadam_hook.session.buffers import BucketBuffers

    original = getattr(BucketBuffers, name)

    def delayed(plan: BucketBuffers) -> Any:
        if torch.rand((), generator=jitter) < 0.2:
            time.sleep(torch.rand((), generator=jitter).item() * 1e-3)
        return original(plan)

    setattr(BucketBuffers, name, delayed)


@pytest.mark.timeout(300)
def test_20_buckets_200_steps_with_jitter_neither_hang_nor_reorder() -> None:
    results = [run_ranks(soak, 3, topology, timeout=140) for topology in ("rank0", "sharded")]
    first, buckets, steps = results[0][0]
    assert buckets >= 20
    assert steps == 200
    for weights, _, _ in (*results[0], *results[1]):
        assert all(torch.equal(a, b) for a, b in zip(weights, first, strict=True))


def disagree(rank: int, world_size: int, by_rank: list[dict[str, Any]], by_hand: bool) -> str:
    shapes = by_rank[rank].pop("shapes", SHAPES)
    model = ddp(ChosenGradients(shapes))
    try:
        if by_hand:
            model.register_comm_hook(EfficientAdamState(**by_rank[rank]), efficient_adam_hook)
            gradients_of(model, rank, 0)
        else:
            attach(model, **by_rank[rank])
    except (DisagreementError, RuntimeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("odd", "shown"),
    [
        ({"quantizer": "lloyd2"}, "worker_quantizer is 'lloyd2' on rank 1 and 'lloyd4' on rank 0"),
        ({"block_size": 128}, "block_size is 128 on rank 1 and None on rank 0"),
        ({"topology": "sharded"}, "topology is 'sharded' on rank 1 and 'auto' on rank 0"),
        ({"enabled": False}, "enabled is False on rank 1 and True on rank 0"),
    ],
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_ranks_that_differ_raise_everywhere_and_say_in_what(
    odd: dict[str, Any], shown: str, by_hand: bool
) -> None:
    if by_hand and "enabled" in odd:
        pytest.skip("a state registered by hand compares when it first compresses")
    for message in run_ranks(disagree, 3, [{}, odd, {}], by_hand):
        assert shown in message


def check_parameter_order(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    named = list(model.module.named_parameters())
    state = EfficientAdamState()
    try:
        state.bind(named[::-1] if rank == 1 else named, model.process_group)
    except DisagreementError as error:
        return str(error)
    return "no error"


def test_ranks_with_other_parameters_raise_everywhere() -> None:
    for message in run_ranks(check_parameter_order, 2):
        assert "parameters.weights.0" in message
        assert "on rank 1" in message


def use_a_subgroup(rank: int, world_size: int) -> list[list[Tensor]]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[rank % 2]
    model = DistributedDataParallel(ChosenGradients(), process_group=mine, bucket_cap_mb=0.004)
    attach(model, quantizer="none", topology="sharded" if rank % 2 else "rank0")
    return [gradients_of(model, rank, step) for step in range(3)]


def test_a_process_group_is_averaged_over_its_own_ranks() -> None:
    ranks = run_ranks(use_a_subgroup, 4)
    for rank, received in enumerate(ranks):
        members = (1, 3) if rank % 2 else (0, 2)
        for step, got in enumerate(received):
            every = [drawn_gradients(member, step) for member in members]
            assert close(got, [a / 2 + b / 2 for a, b in zip(*every, strict=True)])


class MixedTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.zeros(300, 3, dtype=torch.bfloat16))
        self.middle = nn.Parameter(torch.zeros(77, 5))
        self.high = nn.Parameter(torch.zeros(31, 17, dtype=torch.float64))

    def forward(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        terms = [
            (p * torch.randn(p.shape, generator=draw).to(p.dtype)).sum().double()
            for p in self.parameters()
        ]
        return torch.stack(terms).sum()


def exchange_mixed(rank: int, world_size: int) -> list[tuple[str, Tensor]]:
    model = ddp(MixedTypes())
    attach(model, quantizer="uniform8")
    for step in range(3):
        model.zero_grad()
        model(10 * rank + step).backward()
    return [(str(p.dtype), p.grad) for p in model.parameters()]


def test_buckets_of_different_dtypes_keep_their_own() -> None:
    first, second = run_ranks(exchange_mixed, 2)
    dtypes = [dtype for dtype, _ in first]
    assert dtypes == ["torch.bfloat16", "torch.float32", "torch.float64"]
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 6, sparse=True)
        self.head = nn.Linear(6, 300)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(rows)).square().mean()
        return out


def exchange_sparse(rank: int, world_size: int) -> tuple[Tensor, str]:
    torch.manual_seed(0)
    model = ddp(Sparse())
    state = attach(model)
    for _ in range(3):
        model.zero_grad()
        model(torch.tensor([rank, 7])).backward()
    return model.module.table.weight.grad.to_dense(), state.summary()


def test_sparse_gradients_are_averaged_uncompressed_and_the_summary_says_so() -> None:
    first, second = run_ranks(exchange_sparse, 2)
    assert torch.equal(first[0], second[0])
    assert first[0].abs().sum(dim=1).nonzero().flatten().tolist() == [0, 1, 7]
    assert "bypassed     table.weight: sparse gradient" in first[1]


def misuse(rank: int, world_size: int) -> dict[str, str]:
    messages = {}

    def attempt(name: str, action: Any) -> None:
        try:
            action()
        except (ValueError, TypeError, EffAdamError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    module = ChosenGradients()
    attempt("not ddp", lambda: attach(module))
    wrapped = ddp(module)
    attempt("unknown option", lambda: attach(wrapped, quantiser="lloyd4"))
    attempt("quantizer", lambda: attach(wrapped, quantizer="lloyd5"))
    attempt("block_size", lambda: attach(wrapped, block_size=100))
    attempt("exact", lambda: attach(wrapped, exact="1d"))
    attempt("warmup", lambda: attach(wrapped, warmup_steps=-1))
    attach(wrapped)
    attempt("twice", lambda: attach(wrapped))
    # Not every version of torch can broadcast a complex parameter, as DDP does at the start.
    complex_model = ddp(ChosenGradients())
    complex_model.module.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    attempt("complex", lambda: attach(complex_model))
    unnamed = ddp(ChosenGradients())
    unnamed.register_comm_hook(EfficientAdamState(exact=("weights.*",)), efficient_adam_hook)
    attempt("unnamed", lambda: gradients_of(unnamed, rank, 0))
    attempt("no bucket", lambda: efficient_adam_hook(EfficientAdamState(), (1, 2)))
    return messages


def test_misuse_is_told_with_the_value_and_the_rule() -> None:
    (messages,) = run_ranks(misuse, 1)
    assert messages["not ddp"].startswith("TypeError: Invalid ddp_model: ChosenGradients. Must be")
    assert "quantiser" in messages["unknown option"]
    assert "Invalid quantizer: 'lloyd5'. Must be one of uniform8" in messages["quantizer"]
    assert "Invalid block_size: 100. Must be a multiple of 8" in messages["block_size"]
    assert "Invalid exact: '1d'. Must be a tuple" in messages["exact"]
    assert "Invalid warmup_steps: -1. Must be 0 or more" in messages["warmup"]
    assert "'efficient_adam_hook' already" in messages["twice"]
    assert "torch.complex64" in messages["complex"]
    assert "needs parameter names" in messages.get("unnamed", "")
    assert "python_reducer" in messages["no bucket"]


def fail_in_a_worker_thread(rank: int, world_size: int) -> list[str]:
    model = ddp(ChosenGradients())
    state = attach(model)
    gradients_of(model, rank, 0)
    gradients_of(model, rank, 1)
    plan = state.session.buckets[1]

    def broken() -> None:
        raise OSError("no space left")

    plan.decode = broken  # type: ignore[method-assign]
    messages = []
    for step in (2, 3):
        try:
            gradients_of(model, rank, step)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_an_error_in_a_worker_thread_reaches_backward_with_rank_bucket_and_phase() -> None:
    for rank, (first, second) in enumerate(run_ranks(fail_in_a_worker_thread, 2)):
        assert f"Rank {rank}, bucket 1, decode: no space left" in first
        assert "the exchange has stopped" in second


def train_after_closing(rank: int, world_size: int) -> list[tuple[str, float]]:
    model = ddp(ChosenGradients())
    state = attach(model)
    gradients_of(model, rank, 0)
    state.close()
    found = []
    for enabled in (True, False):
        state.enabled = enabled
        began = time.monotonic()
        with pytest.raises(EffAdamError) as raised:
            gradients_of(model, rank, 1)
        found.append((str(raised.value), time.monotonic() - began))
    return found


def test_a_backward_after_close_is_an_error_at_once_that_names_the_cause() -> None:
    for found in run_ranks(train_after_closing, 2):
        for message, seconds in found:
            assert message.startswith("The state of this model was closed") and seconds < 2


def two_models(rank: int, world_size: int) -> list[bool]:
    results = []
    models = [ddp(ChosenGradients()) for _ in range(2)]
    states = [attach(models[0], quantizer="none"), attach(models[1], quantizer="sign")]
    for step in range(3):
        for model in models:
            results.append(close(gradients_of(model, rank, step), mean_of(step, world_size)))
    for state in states:
        state.close()
    return results


def test_two_models_in_one_process_keep_to_their_own_options() -> None:
    for results in run_ranks(two_models, 2):
        assert results == [True, False] * 3
