"""Update mode without quantization equals AdamW up to rounding, whichever parameters a step uses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effadam_hook import EffAdamError, EfficientAdam, attach
from harness import run_ranks
from training import ddp

WIDTH, PARTS, STEPS = 17, 4, 36
BUCKETS = {"bucket_cap_mb": 0.009}  # of two layers


class Parts(nn.Module):
    """A trunk that every step uses, and parts of which a step uses a subset."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 61, dtype=dtype), nn.Linear(61, WIDTH, dtype=dtype))
            for _ in range(PARTS)
        )

    def forward(self, batch: Tensor, used: set[int]) -> Tensor:
        out = torch.tanh(self.trunk(batch))
        for index in sorted(used):
            out = out + torch.tanh(self.parts[index](out))
        return out


def used_parts(pattern: str, step: int, rank: int) -> set[int]:
    """Return the parts that a rank uses in a step."""
    draw = torch.Generator().manual_seed(step)
    if pattern == "layer drop":
        return {i for i in range(PARTS) if torch.rand(1, generator=draw) < 0.5}
    if pattern == "alternating heads":
        return {step % PARTS}
    if pattern == "experts":  # others on each rank; the last is never used
        return {(step // 3 + rank * (step % 2)) % (PARTS - 1)}
    if pattern == "late":  # nothing but the trunk during the warm-up
        return set(range(PARTS)) if step >= 15 else set()
    if pattern == "retired":
        return set(range(PARTS)) if step < 20 else {0}
    assert pattern == "frozen in mid-run"
    return {i for i in range(PARTS) if step // 5 % (i + 2) == 0}


def apart_from_adamw(
    rank: int,
    world_size: int,
    pattern: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    ddp_options: dict[str, Any],
    set_to_none: bool,
    toggles: bool,
) -> tuple[float, bool, bool]:
    """Return the largest distance from AdamW over a run, and whether moments and steps are equal."""
    torch.manual_seed(0)
    ours, theirs = Parts(), Parts()
    theirs.load_state_dict(ours.state_dict())
    wrapped = [
        ddp(m, find_unused_parameters=True, **BUCKETS, **ddp_options) for m in (ours, theirs)
    ]
    common = {"lr": 3e-3, "weight_decay": 0.02, "betas": (0.8, 0.95)}
    optimizer = EfficientAdam(wrapped[0].parameters(), **common, **settings)
    reference = torch.optim.AdamW(wrapped[1].parameters(), **common)
    state = attach(wrapped[0], optimizer=optimizer, quantizer="none", **options)
    # With second moments of its own, a rank is AdamW only if all see the same data.
    own = settings.get("second_moment") == "shared"
    worst = 0.0
    for step in range(STEPS):
        seed = 1000 * step + (rank if own else 0)
        batch = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
        used = used_parts(pattern, step, rank if own else 0)
        if toggles:
            state.enabled = step // 9 % 2 == 0
        for module, model, opt in zip((ours, theirs), wrapped, (optimizer, reference), strict=True):
            opt.zero_grad(set_to_none=set_to_none)
            if pattern == "frozen in mid-run":
                for index, part in enumerate(module.parts):
                    part.requires_grad_(index in used)
                model(batch, set(range(PARTS))).sub(batch.abs()).square().mean().backward()
            else:
                model(batch, used).sub(batch.abs()).square().mean().backward()
            opt.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            worst = max(worst, float((a - b).abs().max()))
    moments = steps = True
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        got, want = optimizer.state.get(a) or {"step": 0}, reference.state.get(b) or {"step": 0}
        steps &= got["step"] == int(want["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            if key in want:
                scale = float(want[key].abs().max())
                moments &= float((got[key] - want[key]).abs().max()) <= 1e-4 * scale + 1e-12
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, [p.detach() for p in ours.parameters()])
    assert all(torch.equal(a, b) for one in every for a, b in zip(one, every[0], strict=True))
    return worst, moments, steps


PATTERNS = ("layer drop", "alternating heads", "experts", "late", "retired", "frozen in mid-run")
VARIANTS: dict[str, dict[str, Any]] = {
    "local": {"settings": {"second_moment": "local"}},
    "warm-up": {"settings": {"second_moment": "local"}, "options": {"warmup_steps": 11}},
    "toggled": {"settings": {"second_moment": "local"}, "toggles": True},
    "shared": {"settings": {"second_moment": "shared", "refresh_every": 1}},
    "shared, first steps": {
        "settings": {"second_moment": "shared", "refresh_every": STEPS},
        "options": {"topology": "sharded", "warmup_steps": 4},
        "toggles": True,
    },
    "weights": {"options": {"quantize_weights": True}},
    "weights, toggled": {
        "options": {"quantize_weights": True, "topology": "sharded"},
        "toggles": True,
    },
}


def every_pattern(
    rank: int,
    world_size: int,
    shift: int,
    settings: dict[str, Any],
    options: dict[str, Any],
    toggles: bool,
) -> list[str]:
    wrong = []
    for index, pattern in enumerate(PATTERNS):
        # Each case takes one of the combinations, so that all occur.
        view, set_to_none = list(itertools.product((True, False), repeat=2))[(index + shift) % 4]
        buckets = {"gradient_as_bucket_view": view}
        apart, moments, steps = apart_from_adamw(
            rank, world_size, pattern, settings, options, buckets, set_to_none, toggles
        )
        if apart > 2e-5 or not (moments and steps):
            wrong.append(f"{pattern}: {apart:.1e} apart, moments {moments}, steps {steps}")
    return wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_mode_is_adamw_whatever_a_step_uses(variant: str) -> None:
    chosen = {"settings": {}, "options": {}, "toggles": False, **VARIANTS[variant]}
    shift = list(VARIANTS).index(variant)
    for wrong in run_ranks(every_pattern, 2 + shift % 2, shift, *chosen.values()):
        assert wrong == []


def keep_frozen(rank: int, world_size: int) -> float:
    """Return the largest distance from AdamW with frozen second moments, those of one part later."""
    torch.manual_seed(0)
    ours = Parts(torch.float64)
    model = ddp(ours, find_unused_parameters=True)
    optimizer = EfficientAdam(
        model.parameters(), lr=3e-3, betas=(0.8, 0.95), second_moment="frozen", refresh_every=6
    )
    attach(model, optimizer=optimizer, quantizer="none", warmup_steps=5)
    twins = [p.detach().clone().requires_grad_() for p in ours.parameters()]
    books: list[Any] = [None] * len(twins)
    worst = 0.0
    for step in range(30):
        # Part 0 is in the warm-up, parts 1 and 2 come later, part 3 never.
        used = {0} | ({1} if step >= 8 else set()) | ({2} if step % 3 == 0 and step > 9 else set())
        batches = [
            torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(9 * step + r)).double()
            for r in range(world_size)
        ]
        model.zero_grad()
        model(batches[rank], used).square().mean().backward()
        optimizer.step()
        losses = [
            torch.func.functional_call(
                ours, dict(zip(dict(ours.named_parameters()), twins, strict=True)), (b, used)
            )
            for b in batches
        ]
        mean_loss = sum(loss.square().mean() for loss in losses) / world_size
        gradients = torch.autograd.grad(mean_loss, twins, allow_unused=True)
        for index, (p, g) in enumerate(zip(twins, gradients, strict=True)):
            if g is None:
                continue
            book = books[index] or {"m": 0.0, "v": 0.0, "step": 0, "seen": 0, "until": 0}
            books[index] = book
            if step >= 5 and book["step"] == 0:
                book["until"] = 6
            book["step"] += 1
            book["m"] = 0.8 * book["m"] + 0.2 * g
            if step < 5 or book["step"] <= book["until"]:
                book["v"] = 0.95 * book["v"] + 0.05 * g * g
                book["seen"] += 1
            first = book["m"] / (1 - 0.8 ** book["step"])
            second = book["v"] / (1 - 0.95 ** book["seen"])
            with torch.no_grad():
                p.sub_(3e-3 * first / (second.sqrt() + 1e-8))
        for p, q in zip(ours.parameters(), twins, strict=True):
            worst = max(worst, float((p - q).abs().max()))
    return worst


def test_what_the_warm_up_did_not_use_is_frozen_after_steps_of_its_own() -> None:
    assert max(run_ranks(keep_frozen, 3)) <= 1e-10


def owed(model: Parts, state: Any, weights: bool) -> list[Tensor]:
    """Return the servers' view of every weight: minus all residuals, or plus those of the servers."""
    saved = state.state_dict()
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    sums = torch.zeros(2, sum(sizes), dtype=torch.float64)
    for name, mean, server in zip(parameters, *(row.split(sizes) for row in sums), strict=True):
        if name in saved["worker"]:
            mean.add_(saved["worker"][name])
        if name in saved["server"]:
            start, share = saved["server_start"][name], saved["server"][name]
            server[start : start + share.numel()] += share
    dist.all_reduce(sums)
    mean, server = sums[0] / dist.get_world_size(), sums[1]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    return list((flat + server if weights else flat - mean - server).split(sizes))


def rest(rank: int, world_size: int, weights: bool, topology: str) -> tuple[float, float]:
    """Return the largest change of the servers' view in unused steps, and in used ones."""
    torch.manual_seed(0)
    inner = Parts(torch.float64)
    model = ddp(inner, find_unused_parameters=True)
    optimizer = EfficientAdam(model.parameters(), lr=0.01, weight_decay=0.1)
    options: dict[str, Any] = {"quantizer": "lloyd2", "topology": topology}
    if weights:
        options |= {"quantize_weights": True, "server_quantizer": "uniform4"}
    state = attach(model, optimizer=optimizer, **options)
    unused = used = 0.0
    for step in range(24):
        mine = used_parts("experts", step, rank)
        every = set().union(*(used_parts("experts", step, r) for r in range(world_size)))
        before = owed(inner, state, weights)
        model.zero_grad()
        batch = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step + 99 * rank))
        model(batch.double(), mine).square().mean().backward()
        optimizer.step()
        after = owed(inner, state, weights)
        for (name, _), a, b in zip(inner.named_parameters(), before, after, strict=True):
            change = float((a - b).abs().max())
            if name.startswith("parts.") and int(name.split(".")[1]) not in every:
                unused = max(unused, change)
            else:
                used = max(used, change)
    return unused, used


@pytest.mark.parametrize("topology", ["rank0", "sharded"])
@pytest.mark.parametrize("weights", [False, True])
def test_nothing_is_taken_from_what_is_owed_to_an_unused_parameter(
    weights: bool, topology: str
) -> None:
    for unused, used in run_ranks(rest, 3, weights, topology):
        assert unused == 0.0
        assert used > 1e-3


def never_used(rank: int, world_size: int) -> tuple[list[bool], float]:
    """Train with a static graph and a part that is never used; return the averaged steps.

    Returns:
        By step, whether a bucket was averaged densely; and the change of the unused weights.
    """
    torch.manual_seed(0)
    inner = Parts()
    model = ddp(inner, static_graph=True)
    optimizer = EfficientAdam(model.parameters(), second_moment="shared", refresh_every=8)
    state = attach(model, optimizer=optimizer, quantizer="none")
    averaged = []
    for step in range(90):
        model.zero_grad()
        batch = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step + 99 * rank))
        model(batch, {0, 2}).square().mean().backward()
        optimizer.step()
        averaged.append(any(plan.averages_first for plan in state.session.buckets))
    assert len(state.session.buckets) > 1
    torch.manual_seed(0)
    fresh = Parts()
    change = max(
        float((a - b).abs().max())
        for a, b in zip(inner.parts[1].parameters(), fresh.parts[1].parameters(), strict=True)
    )
    return averaged, change


def test_a_parameter_that_is_never_used_does_not_cause_averages_for_ever() -> None:
    for averaged, change in run_ranks(never_used, 2):
        assert change == 0.0
        assert all(averaged[:64])
        assert [step for step in range(66, 90) if averaged[step]] == [72, 80, 88]


def removed(rank: int, world_size: int) -> str:
    inner = Parts()
    model = ddp(inner)
    optimizer = EfficientAdam(model.parameters())
    attach(model, optimizer=optimizer)
    model(torch.ones(2, WIDTH), set(range(PARTS))).sum().backward()
    inner.parts[1][0].weight.grad = None
    with pytest.raises(EffAdamError) as caught:
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # a step that is skipped as a whole
    return str(caught.value)


def test_a_gradient_that_is_removed_after_the_exchange_is_an_error() -> None:
    for message in run_ranks(removed, 2):
        assert "'parts.1.0.weight' was set to None" in message
        assert "requires_grad_(False)" in message
