"""Update mode: the Adam of each worker, the exchange of its updates, and the step that applies them."""

from __future__ import annotations

import gc
import io
import re
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effadam_hook import DisagreementError, EffAdamError, EfficientAdam, attach
from effadam_hook.optim.schedules import PowerSchedule
from harness import run_ranks
from training import SHAPES, ChosenGradients, ddp, drawn_gradients, loss_of

TOPOLOGIES = ("rank0", "sharded")
F64 = torch.float64


def backward(model: nn.Module, rank: int, step: int, dtype: torch.dtype) -> None:
    model.zero_grad()
    model(drawn_gradients(rank, step, dtype=dtype)).backward()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class LocalAdam:
    """The moments and updates of one worker by the formulas, in float64."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float, paper: bool) -> None:
        self.lr, self.betas, self.eps, self.paper = lr, betas, eps, paper
        self.first = [torch.zeros(s, dtype=F64) for s in SHAPES]
        self.second = [torch.full(s, eps if paper else 0.0, dtype=F64) for s in SHAPES]
        self.steps = 0

    def update(self, gradients: list[Tensor]) -> list[Tensor]:
        self.steps += 1
        beta1, beta2 = self.betas
        updates = []
        for p, g in enumerate(gradients):
            self.first[p] = beta1 * self.first[p] + (1 - beta1) * g
            self.second[p] = beta2 * self.second[p] + (1 - beta2) * g * g
            if self.paper:
                updates.append(self.lr * self.first[p] / self.second[p].sqrt())
            else:
                first = self.first[p] / (1 - beta1**self.steps)
                second = self.second[p] / (1 - beta2**self.steps)
                updates.append(self.lr * first / (second.sqrt() + self.eps))
        return updates


def run_updates(
    rank: int, world_size: int, steps: int, paper: bool, options: dict[str, Any]
) -> list[tuple[list[Tensor], dict[str, Any]]]:
    model = ddp(ChosenGradients(dtype=F64))
    if paper:
        optimizer = EfficientAdam.paper(model.parameters(), lr=0.01)
    else:
        optimizer = EfficientAdam(model.parameters(), lr=0.01, second_moment="local")
    state = attach(model, optimizer=optimizer, **options)
    history = []
    for step in range(steps):
        backward(model, rank, step, F64)
        optimizer.step()
        history.append((weights_of(model), state.state_dict()))
    assert len(state.session.buckets) >= 3
    return history


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("quantizer", "paper"), [("lloyd2", False), ("sign", True)])
def test_the_virtual_iterate_follows_the_mean_update(
    topology: str, quantizer: str, paper: bool
) -> None:
    """Check that x - ẽ - (1/N) Σ e_i moves by exactly -(1/N) Σ u_i, in float64 over 100 steps."""
    world_size, steps = 3, 100
    ranks = run_ranks(
        run_updates, world_size, steps, paper, {"quantizer": quantizer, "topology": topology}
    )
    workers = [LocalAdam(0.01, (0.9, 0.999), 1e-8, paper) for _ in range(world_size)]
    expected = [torch.zeros(s, dtype=F64) for s in SHAPES]
    for step in range(steps):
        updates = [w.update(drawn_gradients(r, step, dtype=F64)) for r, w in enumerate(workers)]
        saved = [rank[step][1] for rank in ranks]
        for p, shape in enumerate(SHAPES):
            expected[p] = expected[p] - sum(u[p] for u in updates) / world_size
            name = f"weights.{p}"
            virtual = ranks[0][step][0][p].flatten().clone()
            for state in saved:
                virtual -= state["worker"][name] / world_size
                if name in state["server"]:
                    share, start = state["server"][name], state["server_start"][name]
                    virtual[start : start + share.numel()] -= share
            error = (virtual.view(shape) - expected[p]).abs().max()
            assert error <= 1e-12 * max(1.0, expected[p].abs().max()), (step, name)
    for history in ranks[1:]:
        for (got, _), (want, _) in zip(history, ranks[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def against_torch(rank: int, world_size: int, weight_decay: float, dtype: torch.dtype) -> float:
    worst = 0.0
    model = ddp(ChosenGradients(dtype=dtype))
    twin = ChosenGradients(dtype=dtype)
    with torch.no_grad():
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.normal_()
            b.copy_(a)
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": weight_decay}
    optimizer = EfficientAdam(model.parameters(), **settings)
    reference = torch.optim.AdamW(twin.parameters(), **settings)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, reference)]
    attach(model, optimizer=optimizer, quantizer="none")
    for step in range(30):
        backward(model, rank, step, dtype)
        backward(twin, rank, step, dtype)
        optimizer.step()
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "rounding"), [(F64, 1e-14), (torch.float32, 1e-6)])
def test_one_worker_without_quantization_is_adamw(
    weight_decay: float, dtype: torch.dtype, rounding: float
) -> None:
    (worst,) = run_ranks(against_torch, 1, weight_decay, dtype)
    assert worst <= rounding


def warm_up(rank: int, world_size: int, second_moment: str) -> dict[str, Any]:
    model, twin = ddp(ChosenGradients(dtype=F64)), ddp(ChosenGradients(dtype=F64))
    optimizer = EfficientAdam(
        model.parameters(), lr=0.01, second_moment=second_moment, refresh_every=4
    )
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    state = attach(model, optimizer=optimizer, quantizer="lloyd2", warmup_steps=5)
    equal_to_ddp = []
    moments = []
    for step in range(14):
        backward(model, rank, step, F64)
        backward(twin, rank, step, F64)
        optimizer.step()
        reference.step()
        equal_to_ddp.append(
            all(
                bool((a - b).abs().max() <= 1e-10 * b.abs().max())
                for a, b in zip(model.parameters(), twin.parameters(), strict=True)
            )
        )
        moments.append([optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()])
    return {
        "equal": equal_to_ddp,
        "moments": moments,
        "weights": weights_of(model),
        "stats": state.stats(),
    }


@pytest.mark.parametrize("second_moment", ["local", "shared", "frozen"])
def test_after_a_dense_warm_up_the_second_moment_follows_its_rule(second_moment: str) -> None:
    ranks = run_ranks(warm_up, 3, second_moment)
    for result in ranks:
        assert result["equal"][:5] == [True] * 5
        assert all(
            torch.equal(a, b) for a, b in zip(result["weights"], ranks[0]["weights"], strict=True)
        )
    common = all(
        torch.equal(a, b)
        for a, b in zip(ranks[0]["moments"][-1], ranks[1]["moments"][-1], strict=True)
    )
    assert common == (second_moment != "local")
    changed = [
        not torch.equal(ranks[0]["moments"][t][0], ranks[0]["moments"][t - 1][0])
        for t in range(5, 14)
    ]
    # Steps 6 to 14; a shared moment is refreshed at steps 1, 5, 9, 13.
    wanted = {"local": [True] * 9, "frozen": [False] * 9}
    wanted["shared"] = [step % 4 == 1 for step in range(6, 15)]
    assert changed == wanted[second_moment]


def shared_moment(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    model = ddp(ChosenGradients(dtype=F64))
    optimizer = EfficientAdam(
        model.parameters(), betas=(0.9, 0.99), second_moment="shared", refresh_every=3
    )
    attach(model, optimizer=optimizer, quantizer="lloyd3", topology="sharded")
    for step in range(8):
        backward(model, rank, step, F64)
        optimizer.step()
    expected = [torch.zeros(s, dtype=F64) for s in SHAPES]
    for step, rested in ((0, 1), (1, 1), (2, 1), (3, 1), (6, 3)):
        keep = 0.99**rested
        for p in range(len(SHAPES)):
            every = [drawn_gradients(r, step, dtype=F64)[p] for r in range(world_size)]
            mean = sum(every) / world_size
            expected[p] = keep * expected[p] + (1 - keep) * mean * mean
    return [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()], expected


def test_a_shared_second_moment_follows_the_mean_gradient() -> None:
    for got, wanted in run_ranks(shared_moment, 3):
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=0)


def switch_off(rank: int, world_size: int) -> list[list[Tensor]]:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), lr=0.01)
    state = attach(model, optimizer=optimizer, quantizer="lloyd2")
    history = []
    for step in range(18):
        state.enabled = step % 6 < 3
        backward(model, rank, step, torch.float32)
        optimizer.step()
        history.append(weights_of(model))
    return history


def test_replicas_stay_equal_when_compression_is_switched_off_and_on_again_and_again() -> None:
    first, *others = run_ranks(switch_off, 3)
    for history in others:
        for got, want in zip(history, first, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def build() -> tuple[Any, EfficientAdam, Any]:
    torch.manual_seed(0)
    model = ddp(
        nn.Sequential(
            *(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 67), nn.Tanh()),
            *(nn.Linear(67, 43), nn.Tanh(), nn.Linear(43, 5)),
        )
    )
    optimizer = EfficientAdam(
        model.parameters(), lr=3e-3, weight_decay=0.01, schedule=PowerSchedule(3e-3, 0.2, 0.1, 0.9)
    )
    return model, optimizer, attach(model, optimizer=optimizer, quantizer="lloyd2")


def train(model: Any, optimizer: EfficientAdam, rank: int, steps: range) -> None:
    for step in steps:
        batch = torch.randn(8, 23, generator=torch.Generator().manual_seed(100 * step + rank))

        def closure(batch: Tensor = batch, step: int = step) -> Tensor:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0


def resume(rank: int, world_size: int) -> bool:
    model, optimizer, state = build()
    train(model, optimizer, rank, range(7))
    file = io.BytesIO()
    # The optimizer's state is that of rank 0, as users save it; the hook's has every rank's moments.
    box = [optimizer.state_dict(), state.full_state_dict()]
    dist.broadcast_object_list(box)
    torch.save({"model": model.state_dict(), "optimizer": box[0], "hook": box[1]}, file)
    train(model, optimizer, rank, range(7, 14))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer_again, state_again = build()
    # Adopt buckets first: loading must replace what they have adopted.
    train(again, optimizer_again, rank, range(3))
    again.load_state_dict(saved["model"])
    optimizer_again.load_state_dict(saved["optimizer"])
    state_again.load_state_dict(saved["hook"])
    train(again, optimizer_again, rank, range(7, 14))
    return all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit() -> None:
    assert run_ranks(resume, 3) == [True] * 3


def resume_densely(rank: int, world_size: int) -> list[Tensor]:
    model, optimizer, state = build()
    train(model, optimizer, rank, range(4))
    saved = state.state_dict()
    again, optimizer_again, state_again = build()
    again.load_state_dict(model.state_dict())
    state_again.load_state_dict(saved)
    state_again.enabled = False
    train(again, optimizer_again, rank, range(4, 7))
    return weights_of(again)


def test_replicas_stay_equal_when_a_resumed_run_begins_with_dense_steps() -> None:
    first, *others = run_ranks(resume_densely, 3)
    for weights in others:
        assert all(torch.equal(a, b) for a, b in zip(weights, first, strict=True))


def reload_on_one_rank(rank: int, world_size: int, buckets: int) -> str:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(buckets)))
    model = ddp(module)
    optimizer = EfficientAdam(model.parameters(), lr=0.01)
    state = attach(model, optimizer=optimizer)
    for step in range(12):
        state.enabled = step < 3
        if step == 6 and rank == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        try:
            model(torch.full((2, 32), 0.01 * (step + rank))).square().mean().backward()
        except DisagreementError as error:
            assert step == 6
            return str(error)
        optimizer.step()
    return ""


@pytest.mark.parametrize("buckets", [1, 3])  # of one bucket, moments and gradients have one size
def test_moments_loaded_on_one_rank_between_dense_steps_are_an_error_on_all(buckets: int) -> None:
    for message in run_ranks(reload_on_one_rank, 3, buckets):
        assert re.search(r"rank 1 does a dense all-reduce with \d moments in bucket 0", message)
        assert re.search(r"rank [02] does a dense all-reduce in bucket 0", message)


def step_twice(rank: int, world_size: int) -> str:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), lr=0.01)
    attach(model, optimizer=optimizer)
    backward(model, rank, 0, torch.float32)
    optimizer.step()
    with pytest.raises(EffAdamError) as raised:
        optimizer.step()
    backward(model, rank, 1, torch.float32)
    optimizer.step()
    return str(raised.value)


def test_a_second_step_of_one_backward_is_an_error() -> None:
    for message in run_ranks(step_twice, 2):
        assert message.startswith("step() was called twice after one backward")


def low_precision(rank: int, world_size: int) -> list[str]:
    model = ddp(ChosenGradients(dtype=torch.bfloat16))
    optimizer = EfficientAdam(model.parameters(), lr=0.5)
    attach(model, optimizer=optimizer)
    for step in range(3):
        backward(model, rank, step, torch.bfloat16)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(p.abs().max() > 0 for p in model.parameters())
    return [str(optimizer.state[p]["exp_avg_sq"].dtype) for p in model.parameters()]


def test_moments_are_float32_whatever_the_parameters() -> None:
    for dtypes in run_ranks(low_precision, 2):
        assert set(dtypes) == {"torch.float32"}


def clipped(rank: int, world_size: int, bound: float) -> list[Tensor]:
    model = ddp(ChosenGradients(dtype=F64))
    optimizer = EfficientAdam(model.parameters(), lr=0.01, eps=1.0, max_grad_norm=bound)
    attach(model, optimizer=optimizer, quantizer="none", topology="sharded")
    for step in range(4):
        backward(model, rank, step, F64)
        optimizer.step()
    return weights_of(model)


def test_max_grad_norm_bounds_each_workers_whole_gradient() -> None:
    bound = 5.0
    (got,) = {tuple(map(id, w)): w for w in run_ranks(clipped, 1, bound)}.values()
    worker = LocalAdam(0.01, (0.9, 0.999), 1.0, paper=False)
    expected = [torch.zeros(s, dtype=F64) for s in SHAPES]
    for step in range(4):
        gradients = drawn_gradients(0, step, dtype=F64)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > bound
        for p, u in enumerate(worker.update([g * (bound / norm) for g in gradients])):
            expected[p] -= u
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def in_memory_format(rank: int, world_size: int, channels_last: bool, kind: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Tanh(), nn.Flatten(), nn.Linear(28, 3))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    wrapped = ddp(model)
    options: dict[str, Any] = {"quantizer": "none"}
    optimizer: torch.optim.Optimizer
    if kind == "preconditioned":
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.05)
        options = {"precondition": True, "quantizer": "uniform8", "block_size": 4096}
    else:
        second_moment = "frozen" if kind == "frozen" else "local"
        optimizer = EfficientAdam(wrapped.parameters(), lr=0.05, second_moment=second_moment)
        options |= {"warmup_steps": 2, "quantize_weights": kind == "weights"}
    attach(wrapped, optimizer=optimizer, **options)
    for step in range(6):
        batch = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(step))
        wrapped.zero_grad()
        wrapped(batch).square().mean().backward()
        optimizer.step()
    return [p.detach().contiguous() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["local", "frozen", "weights", "preconditioned"])
def test_memory_format_changes_nothing(kind: str) -> None:
    (plain,) = run_ranks(in_memory_format, 1, False, kind)
    (other,) = run_ranks(in_memory_format, 1, True, kind)
    # Blocks of a channels_last parameter hold its elements in another order.
    tolerance = 5e-3 if kind == "preconditioned" else 1e-4
    for a, b in zip(plain, other, strict=True):
        assert torch.allclose(a, b, atol=tolerance), (a - b).abs().max()


def misuse(rank: int, world_size: int) -> dict[str, str]:
    messages = {}

    def attempt(name: str, action: Any) -> None:
        try:
            action()
        except (ValueError, TypeError, EffAdamError) as error:
            messages[name] = str(error)

    model = ddp(ChosenGradients())
    loose = EfficientAdam(model.parameters())
    backward(model, rank, 0, torch.float32)
    attempt("unattached", loose.step)

    model = ddp(ChosenGradients())
    some = EfficientAdam(list(model.parameters())[1:])
    attempt("missing", lambda: attach(model, optimizer=some))
    some.add_param_group({"params": [next(iter(model.parameters()))], "lr": 0.5})
    attach(model, optimizer=some)
    backward(model, rank, 0, torch.float32)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    attempt("clipped", some.step)

    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters())
    attach(model, optimizer=optimizer)
    with model.no_sync():
        backward(model, rank, 0, torch.float32)
    attempt("no_sync", optimizer.step)

    model = ddp(ChosenGradients())
    stranger = nn.Parameter(torch.ones(3))
    optimizer = EfficientAdam([*model.parameters(), stranger])
    attach(model, optimizer=optimizer)
    backward(model, rank, 0, torch.float32)
    stranger.sum().backward()
    attempt("outside", optimizer.step)

    frozen = EfficientAdam.one_bit_adam(model.parameters())
    attempt("frozen", lambda: attach(ddp(ChosenGradients()), optimizer=frozen))
    adam = torch.optim.Adam(model.parameters())
    attempt("adam", lambda: attach(ddp(ChosenGradients()), optimizer=adam))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    other = EfficientAdam(model.parameters())
    scaled = ddp(ChosenGradients())
    attempt("scaler", lambda: attach(scaled, optimizer=other, grad_scaler=scaler))
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters())
    attach(model, optimizer=optimizer)
    model.zero_grad()
    scaler.scale(model(drawn_gradients(rank, 0))).backward()
    attempt("scaled", lambda: scaler.step(optimizer))
    strange = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    attempt("strange", lambda: attach(ddp(ChosenGradients()), optimizer=strange, precondition=True))
    attempt("sgd", lambda: attach(ddp(ChosenGradients()), optimizer=sgd, precondition=True))
    attempt("lr", lambda: EfficientAdam(model.parameters(), lr=-1))
    attempt("second", lambda: EfficientAdam(model.parameters(), second_moment="common"))
    return messages


def test_misuse_is_reported_with_the_remedy() -> None:
    (messages,) = run_ranks(misuse, 1)
    assert "effadam_hook.attach(ddp_model, optimizer=optimizer)" in messages["unattached"]
    assert "'weights.0' of the DDP model is not in the EfficientAdam" in messages["missing"]
    assert "EfficientAdam(max_grad_norm=...)" in messages["clipped"]
    assert "no_sync()" in messages["no_sync"]
    assert "not part of the attached DDP model" in messages["outside"]
    assert "Invalid warmup_steps: 0" in messages["frozen"]
    assert "precondition=True" in messages["adam"]
    assert "Invalid optimizer for precondition=True: SGD" in messages["sgd"]
    assert "Train in bfloat16" in messages["scaler"]
    assert "cannot be unscaled" in messages["scaled"]
    assert "it lacks the parameter 'weights.0'" in messages["strange"]
    assert "Invalid lr: -1" in messages["lr"]
    assert "Invalid second_moment: 'common'" in messages["second"]


def preconditioned(
    rank: int, world_size: int, topology: str, steps: int
) -> tuple[list[list[Tensor]], dict[str, Any], list[Tensor]]:
    model = ddp(ChosenGradients(dtype=F64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = attach(
        model, optimizer=optimizer, precondition=True, quantizer="lloyd2", topology=topology
    )
    received = []
    for step in range(steps):
        backward(model, rank, step, F64)
        received.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return received, state.state_dict(), weights_of(model)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_preconditioned_gradients_lose_nothing_and_replicas_stay_equal(topology: str) -> None:
    world_size, steps = 3, 30
    ranks = run_ranks(preconditioned, world_size, topology, steps)
    for _, _, weights in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][2], strict=True))
    for p in range(len(SHAPES)):
        name = f"weights.{p}"
        given = sum(
            drawn_gradients(rank, step, dtype=F64)[p].flatten() / world_size
            for rank in range(world_size)
            for step in range(steps)
        )
        arrived = sum(received[p] for received in ranks[0][0]).flatten()
        for _, saved, _ in ranks:
            arrived = arrived + saved["worker"][name] / world_size
            if name in saved["server"]:
                share, start = saved["server"][name], saved["server_start"][name]
                arrived[start : start + share.numel()] += share
        assert (arrived - given).abs().max() <= 1e-12 * given.abs().max()


def test_preconditioned_topologies_agree_to_the_bit() -> None:
    results = [run_ranks(preconditioned, 3, topology, 6)[0] for topology in TOPOLOGIES]
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(a, b)


def quantized_weights(
    rank: int, world_size: int, topology: str, steps: int, options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    model = ddp(ChosenGradients(dtype=F64))
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
    optimizer = EfficientAdam(model.parameters(), lr=0.01, weight_decay=0.1, second_moment="local")
    state = attach(model, optimizer=optimizer, quantize_weights=True, topology=topology, **options)
    for step in range(steps):
        backward(model, rank, step, F64)
        optimizer.step()
    return weights_of(model), state.state_dict()


def server_weights(ranks: list[Any], p: int) -> Tensor:
    """Return the weights that the servers keep: those of the replicas plus the servers' residuals."""
    name = f"weights.{p}"
    whole = ranks[0][0][p].flatten().clone()
    for _, saved in ranks:
        if name in saved["server"]:
            share, start = saved["server"][name], saved["server_start"][name]
            whole[start : start + share.numel()] += share
    return whole.view(SHAPES[p])


@pytest.mark.parametrize("world_size", [1, 3])
def test_quantized_adam_keeps_exact_weights_on_the_server(world_size: int) -> None:
    steps = 20
    options = {"worker_quantizer": "none", "server_quantizer": "uniform8", "scale_rule": "absmax"}
    workers = [LocalAdam(0.01, (0.9, 0.999), 1e-8, paper=False) for _ in range(world_size)]
    exact = [
        torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SHAPES)
    ]
    exact = [x.to(F64) for x in exact]
    for step in range(steps):
        updates = [w.update(drawn_gradients(r, step, dtype=F64)) for r, w in enumerate(workers)]
        for p in range(len(SHAPES)):
            exact[p] = exact[p] * (1 - 0.01 * 0.1) - sum(u[p] for u in updates) / world_size
    for topology in TOPOLOGIES:
        ranks = run_ranks(quantized_weights, world_size, topology, steps, options)
        for p, shape in enumerate(SHAPES):
            held = ranks[0][0][p]
            assert all(torch.equal(held, weights[p]) for weights, _ in ranks)
            # The random draw is float32; from there on everything is float64.
            assert (server_weights(ranks, p) - exact[p]).abs().max() <= 1e-12
            if len(shape) > 1:
                # Half a step by rounding, a quarter by the scale's.
                step_size = exact[p].abs().max() / 127
                assert 0 < (held - exact[p]).abs().max() <= 0.76 * step_size


def test_quantized_adam_topologies_agree_to_the_bit() -> None:
    options = {"worker_quantizer": "log3", "server_quantizer": "uniform8"}
    results = [run_ranks(quantized_weights, 3, topology, 5, options)[0] for topology in TOPOLOGIES]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def disagree_about_settings(rank: int, world_size: int, options: list[dict[str, Any]]) -> str:
    model = ddp(ChosenGradients())
    optimizer = EfficientAdam(model.parameters(), **options[rank])
    with pytest.raises(DisagreementError) as caught:
        attach(model, optimizer=optimizer)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"second_moment": "shared"},
            "optimizer.second_moment is 'shared' on rank 1 and 'local' on rank 0",
        ),
        ({"lr": 0.5}, "optimizer.group 0.lr is '0.5' on rank 1 and '0.001' on rank 0"),
        ({"betas": (0.8, 0.9)}, "optimizer.group 0.betas is '(0.8, 0.9)' on rank 1"),
    ],
)
def test_ranks_whose_optimizers_differ_raise_everywhere(
    options: dict[str, Any], message: str
) -> None:
    for raised in run_ranks(disagree_about_settings, 2, [{}, options]):
        assert message in raised


def test_the_optimizer_has_no_public_methods_for_the_hook() -> None:
    own = {name for name in vars(EfficientAdam) if not name.startswith("_")}
    assert own == {"load_state_dict", "one_bit_adam", "paper", "state_dict", "step"}


def test_moments_are_freed_with_the_optimizer() -> None:
    optimizer = EfficientAdam([nn.Parameter(torch.ones(3))])
    moment = weakref.ref(
        optimizer.recursion.init_state(optimizer.param_groups[0]["params"][0])["exp_avg"]
    )
    gc.disable()
    try:
        del optimizer
        assert moment() is None
    finally:
        gc.enable()
