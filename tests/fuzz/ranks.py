"""Runs fuzzed cases on a rank, many in one set of processes, and reports what it saw."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import zlib
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach, layout
from effadam_hook.exchange import watchdog
from effadam_hook.plan import BucketPlan
from fuzz.cases import Case, Model, draw, gradients

__all__ = ["Report", "lose_a_rank", "run_batch"]

_PHASES = ("encode", "reduce", "decode")


@dataclass
class Report:
    """What one rank saw of one case.

    Attributes:
        digests: One per step, of all gradients, or of the weights in update mode.
        arrived: Sums of what arrived, by parameter.
        given: Sums of this rank's own gradients, by parameter.
        saved: The saved state at the end.
        is_finite: Whether the residuals are.
        error: What was raised, if anything.
        seconds: How long the last step took.
    """

    digests: list[int] = field(default_factory=list)
    arrived: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)
    is_finite: bool = True
    error: str = ""
    seconds: float = 0.0


def run_batch(rank: int, world_size: int, plan: list[tuple[int, str]]) -> list[Report]:
    """Run cases one after the other, in one process.

    Args:
        rank: This rank.
        world_size: How many there are.
        plan: Seed and ending of each case.

    Returns:
        A report per case; fewer if one ended as it should not have.
    """
    watchdog.PATIENCE_S = 1.0
    reports = []
    for seed, ending in plan:
        case = draw(seed, world_size, ending)
        report = Report()
        reports.append(report)
        layout.PART_NUMEL = case.part_numel
        with _delays(case, rank):
            _run(case, rank, report)
        if bool(report.error) != bool(case.ending):
            break
    return reports


def _run(case: Case, rank: int, report: Report) -> None:
    report.arrived = [torch.zeros(s, dtype=torch.float64) for s in case.shapes]
    report.given = [torch.zeros(s, dtype=torch.float64) for s in case.shapes]
    model, optimizer, state = _build(case)
    try:
        for step in range(case.steps):
            if step in case.switched:
                state.enabled = not state.enabled
            if step == case.resumed:
                saved = state.state_dict()
                saved_model, saved_optimizer = model.state_dict(), optimizer.state_dict()
                enabled = state.enabled
                state.close()
                model, optimizer, state = _build(case)
                model.load_state_dict(saved_model)
                optimizer.load_state_dict(saved_optimizer)
                state.load_state_dict(saved)
                state.enabled = enabled
            if case.ending and step == case.steps - 2 and rank == case.culprit:
                _spoil(case, model, state)
            began = time.monotonic()
            _step(case, rank, step, model, optimizer, report)
            report.seconds = time.monotonic() - began
        if case.ending == "weights changed on one rank":
            # One weight of every eighth step is compared in buckets other than the first.
            for step in range(8 * len(case.shapes)):
                _step(case, rank, step, model, optimizer, report)
    except RuntimeError as error:
        report.error = f"{type(error).__name__}: {error}"
        report.seconds = time.monotonic() - began
    else:
        report.saved = state.state_dict()
    for side in (state._engine.worker, state._engine.server):
        for _, residual in side:
            report.is_finite &= bool(residual.isfinite().all())
    state.close()


def _build(
    case: Case,
) -> tuple[DistributedDataParallel, torch.optim.Optimizer, EfficientAdamState]:
    model = DistributedDataParallel(Model(case.shapes, case.dtype), **case.ddp_options)
    options = dict(case.options)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if case.mode == "update":
        options["optimizer"] = optimizer = EfficientAdam(model.parameters(), lr=1e-3)
    if case.mode == "preconditioned":
        options["optimizer"] = optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        options["precondition"] = True
    return model, optimizer, attach(model, **options)


def _step(
    case: Case,
    rank: int,
    step: int,
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    report: Report,
) -> None:
    chosen = gradients(case, rank, step)
    optimizer.zero_grad()
    model(chosen).backward()
    got = [p.grad for p in model.parameters()]
    is_finite = all(bool(g.isfinite().all()) for g in got if g is not None)
    for p, (grad, own) in enumerate(zip(got, chosen, strict=True)):
        if grad is not None:
            report.arrived[p] += grad.double()
        if own is not None:
            report.given[p] += own.double()
    shown = got
    if is_finite:  # as GradScaler would have it
        optimizer.step()
    if case.mode == "update":
        shown = [p.detach() for p in model.parameters()]
    report.digests.append(_digest(shown))


def _digest(tensors: list[Tensor | None]) -> int:
    digest = 0
    for tensor in tensors:
        if tensor is not None:
            plain = tensor.detach().double().nan_to_num(nan=1e300).contiguous()
            digest = zlib.crc32(plain.numpy().tobytes(), digest)
    return digest


def _spoil(case: Case, model: DistributedDataParallel, state: EfficientAdamState) -> None:
    phase = case.ending.rpartition(" ")[2]
    if phase in _PHASES:
        setattr(BucketPlan, phase, _fail)
    elif case.ending.startswith("weights"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    else:
        state.enabled = not state.enabled


def _fail(*_: Any) -> None:
    raise OSError("made to fail")


@contextlib.contextmanager
def _delays(case: Case, rank: int) -> Any:
    """Delay every phase, if the case wants it; and put back whatever was done to them."""
    originals = {name: getattr(BucketPlan, name) for name in _PHASES}
    chance = random.Random(case.seed * 7 + rank)

    def delayed(name: str) -> Any:
        def run(plan: BucketPlan) -> Any:
            if chance.random() < 0.3:
                time.sleep(chance.random() * 2e-3)
            return originals[name](plan)

        return run

    for name in _PHASES if case.jitter else ():
        setattr(BucketPlan, name, delayed(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(BucketPlan, name, original)


def lose_a_rank(rank: int, world_size: int, folder: str, seed: int, number: int) -> Report:
    """Run a case until one rank is killed or stopped at a random moment.

    Args:
        rank: This rank.
        world_size: How many there are.
        folder: For the rendezvous.
        seed: Of the case.
        number: The signal.
    """
    watchdog.PATIENCE_S = 1.0
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{seed}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=4),
    )
    pids: list[Any] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    case = draw(seed, world_size, "lost")
    chance = random.Random(seed)
    countdown = chance.randint(1, 12)
    name = chance.choice(_PHASES)
    # In topology "rank0" only rank 0 reduces.
    culprit = 0 if name == "reduce" else case.culprit
    if rank == culprit:
        original = getattr(BucketPlan, name)

        def counted(plan: BucketPlan) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown <= 0:
                os.kill(os.getpid(), number)
            return original(plan)

        setattr(BucketPlan, name, counted)
    report = Report()
    model, optimizer, state = _build(case)
    report.given = [torch.zeros(s, dtype=torch.float64) for s in case.shapes]
    report.arrived = [torch.zeros(s, dtype=torch.float64) for s in case.shapes]
    began = time.monotonic()
    try:
        for step in range(40):
            began = time.monotonic()
            _step(case, rank, step, model, optimizer, report)
    except RuntimeError as error:
        report.error = f"{type(error).__name__}: {error}"
    report.seconds = time.monotonic() - began
    for _, residual in state._engine.worker:
        report.is_finite &= bool(residual.isfinite().all())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[culprit], signal.SIGKILL)  # a stopped one would stay
    return report
