"""Runs fuzzed cases on a rank, many in one set of processes, and reports what it saw."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach
from effadam_hook.ddp.accumulation import AccumulationCheck
from effadam_hook.exchange.node_description import HOST_VARIABLE
from effadam_hook.exchange.watchdog import watchdog
from effadam_hook.session import buckets, connection
from effadam_hook.session.buffers import BucketBuffers
from effadam_hook.wire import parts
from fuzz.cases import WRAPPERS, Case, Model, draw, gradients

__all__ = ["Report", "lose_a_rank", "run_batch"]

_PHASES = ("encode", "reduce", "decode")
_NODE_PHASES = ("pack", "average")
_RAISING: dict[str, tuple[Any, str]] = {
    **{f"exception in {phase}": (BucketBuffers, phase) for phase in _PHASES},
    "exception in planning": (buckets, "BucketBuffers"),
    "exception in the choice of kernels": (connection, "select"),
    "exception in the check of accumulation": (AccumulationCheck, "begin"),
}
"""By ending, what is replaced by a function that raises."""


@dataclass
class Report:
    """Observations of one rank in one case.

    Attributes:
        digests: One per step, of all gradients, or of the weights in update mode.
        arrived: Sums of what arrived, by parameter.
        given: Sums of this rank's own gradients, by parameter.
        weights: At the end, by parameter.
        saved: The saved state at the end.
        is_finite: Whether the residuals are.
        overflows: Steps at which something arrived that is not finite, though all that was given is.
        error: What was raised, if anything.
        seconds: How long the last step took.
    """

    digests: list[int] = field(default_factory=list)
    arrived: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)
    is_finite: bool = True
    overflows: list[int] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    def start(self, case: Case) -> None:
        """Begin the sums."""
        self.arrived = [torch.zeros(shape, dtype=torch.float64) for shape in case.shapes]
        self.given = [torch.zeros(shape, dtype=torch.float64) for shape in case.shapes]


@dataclass
class _Run:
    """One model in training, and what belongs to it."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    state: EfficientAdamState
    scaler: torch.amp.GradScaler | None

    @property
    def parameters(self) -> list[Tensor]:
        """By number, whatever the order in which they are registered."""
        parameters: list[Tensor] = self.model.module.ordered
        return parameters


def run_batch(
    rank: int, world_size: int, plan: list[tuple[int, str]], nodes: int = 0
) -> list[Report]:
    """Run cases one after the other, in one process.

    Args:
        rank: This rank.
        world_size: How many there are.
        plan: Seed and ending of each case.
        nodes: Number of nodes in the hierarchical topology; 0 for flat ones.

    Returns:
        A report per case; fewer if one ended as it should not have.
    """
    watchdog.PATIENCE_S = 1.0
    alone = [dist.new_group([other]) for other in range(world_size)][rank]
    reports = []
    for seed, ending in plan:
        case = draw(seed, world_size, ending, nodes)
        _name_host(case, rank)
        report = Report()
        reports.append(report)
        parts.PART_NUMEL = case.part_numel
        # What can end a run as an error, with -W error, must not be said in vain.
        with warnings.catch_warnings(), _replaced(case, rank):
            warnings.filterwarnings("error", "Gradients of the last backward were still there")
            warnings.filterwarnings("ignore", "exact=.* replaces the default")
            _run(case, rank, report, alone)
        if bool(report.error) != bool(case.ending):
            break
    return reports


def _name_host(case: Case, rank: int) -> None:
    """Pretend that this rank is on the host of its node."""
    os.environ[HOST_VARIABLE] = f"host{case.nodes[rank]}" if case.nodes else "host"


def _run(case: Case, rank: int, report: Report, alone: dist.ProcessGroup) -> None:
    report.start(case)
    # DDP's own collectives pair up with other runs' unless models are made by all ranks alike.
    run = _build(case, alone if case.is_alone(0) else None)
    other = _build(case, None) if case.ending and "order" in case.ending.name else None
    runs, aside = [run], Report()
    aside.start(case)
    began = time.monotonic()
    try:
        joining = run.model.join() if case.batches else contextlib.nullcontext()
        with joining:
            for step in range(case.batches[rank] if case.batches else case.steps):
                if step in case.switched:
                    run.state.enabled = not run.state.enabled
                if step == case.resumed - 1:
                    earlier = run.state.state_dict()
                if step == case.resumed:
                    odd = case.ending is not None and rank == case.culprit
                    run = _rebuild(case, run, earlier if odd else None)
                    runs.append(run)
                if step == case.copied:
                    _use_a_copy(case, rank, step, run, report)
                if _is_due(case, step) and rank == case.culprit:
                    _spoil(case, run, other)
                began = time.monotonic()
                steps = [(run, report), (other, aside)] if other is not None else [(run, report)]
                if _is_due(case, step) and rank == case.culprit:
                    steps.reverse()
                for one, into in steps:
                    _step(case, rank, step, one, into)
                report.seconds = time.monotonic() - began
        if case.ending and case.ending.name.startswith("weights"):
            # One weight of every seventh step is compared in buckets other than the first.
            for step in range(7 * len(case.shapes)):
                _step(case, rank, step, run, report)
        report.saved = run.state.state_dict()
    except Exception as error:
        report.error = f"{type(error).__name__}: {error}"
        report.seconds = time.monotonic() - began
    report.weights = [parameter.detach().clone() for parameter in run.parameters]
    for one in (*runs, *([other] if other else [])):
        for side in (one.state.session.worker, one.state.session.server):
            for _, residual in side:
                report.is_finite &= bool(residual.isfinite().all())
        one.state.close()


def _build(
    case: Case,
    group: dist.ProcessGroup | None,
    order: tuple[int, ...] = (),
    wrapper: str = "",
) -> _Run:
    module = Model(case.shapes, case.dtype, order, wrapper)
    model = DistributedDataParallel(module, process_group=group, **case.ddp_options)
    options = dict(case.options)
    if case.nodes and group is not None:  # a rank alone
        options["topology"] = "sharded"
    if wrapper and case.seed % 2:
        # Rules hold for names as they are in the model, too.
        options["exact"] = tuple(
            rule.replace("weights.", f"{wrapper}.weights.") for rule in options["exact"]
        )
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = None
    if case.updates:
        optimizer = EfficientAdam(model.parameters(), **case.optimizer_options)
        options |= {"optimizer": optimizer, "quantize_weights": case.mode == "weights"}
    if case.mode == "preconditioned":
        options["optimizer"] = optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        options["precondition"] = True
    if case.scales:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (case.seed % 13), growth_interval=2)
        options["grad_scaler"] = scaler
    return _Run(model, optimizer, attach(model, **options), scaler)


def _rebuild(case: Case, run: _Run, earlier: dict[str, Any] | None) -> _Run:
    """Model and state anew, continued from what was saved, or from an ``earlier`` state."""
    full = case.rebuild in ("resumed from a full state", "resumed on more ranks")
    saved = run.state.full_state_dict() if full else run.state.state_dict()
    if full:
        handed = [saved]
        dist.broadcast_object_list(handed, 0)  # as if all ranks read one file
        saved = handed[0]
    enabled, weights = run.state.enabled, [p.detach().clone() for p in run.parameters]
    run.state.close()
    order, wrapper = tuple(range(len(case.shapes))), ""
    if case.rebuild == "resumed with parameters in another order":
        random.Random(case.seed).shuffle(shuffled := list(order))
        order = tuple(shuffled)
    if case.rebuild == "resumed under another wrapper":
        wrapper = WRAPPERS[1 + case.seed % (len(WRAPPERS) - 1)]
    new = _build(case, None, order, wrapper)
    with torch.no_grad():
        for parameter, weight in zip(new.parameters, weights, strict=True):
            parameter.copy_(weight)
    if order == tuple(range(len(case.shapes))):
        new.optimizer.load_state_dict(run.optimizer.state_dict())
    if new.scaler is not None and run.scaler is not None:
        new.scaler.load_state_dict(run.scaler.state_dict())
    new.state.load_state_dict(saved if earlier is None else earlier)
    new.state.enabled = enabled
    return new


def _use_a_copy(case: Case, rank: int, step: int, run: _Run, report: Report) -> None:
    """Copy the DDP model in the middle of training, and train with the copy for a step."""
    twin = copy.deepcopy(run.model)
    twin.zero_grad()
    twin(gradients(case, rank, step)).backward()
    report.digests.append(_digest([p.grad for p in twin.module.ordered]))


def _step(case: Case, rank: int, step: int, run: _Run, report: Report) -> None:
    chosen = gradients(case, rank, step)
    run.optimizer.zero_grad(set_to_none=case.set_to_none)
    loss = run.model(chosen)
    if run.scaler is None:
        loss.backward()
    else:
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
    got = [p.grad for p in run.parameters]
    is_finite = all(bool(g.isfinite().all()) for g in got if g is not None)
    if not is_finite and step not in case.poisoned:
        report.overflows.append(step)
    for p, (grad, own) in enumerate(zip(got, chosen, strict=True)):
        if grad is not None:
            report.arrived[p] += grad.double()
        if own is not None:
            report.given[p] += own.double()
    shown = got
    if run.scaler is not None:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    elif is_finite:
        run.optimizer.step()
    if case.updates:
        shown = [p.detach() for p in run.parameters]
    report.digests.append(_digest(shown))


def _digest(tensors: list[Tensor | None]) -> int:
    digest = 0
    for tensor in tensors:
        if tensor is not None:
            plain = tensor.detach().double().nan_to_num(nan=1e300).contiguous()
            digest = zlib.crc32(plain.numpy().tobytes(), digest)
    return digest


def _is_due(case: Case, step: int) -> bool:
    """Return whether the ending comes in this step."""
    return case.ending is not None and step == (0 if case.ending.at_start else case.steps - 2)


def _spoil(case: Case, run: _Run, other: _Run | None) -> None:
    """Do what the ending says on this rank; the rest is done where it happens."""
    assert case.ending is not None
    name = case.ending.name
    if name in _RAISING:
        setattr(*_RAISING[name], _fail)
    elif name.startswith("weights"):
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.add_(1)
    elif name.startswith("enabled"):
        run.state.enabled = not run.state.enabled
    elif name.startswith("a barrier"):
        dist.barrier()


def _fail(*_: Any, **__: Any) -> None:
    raise OSError("made to fail")


@contextlib.contextmanager
def _replaced(case: Case, rank: int) -> Iterator[None]:
    """Delay every phase, if the case wants it; and put back whatever was replaced."""
    replaced = [*_RAISING.values(), *((BucketBuffers, name) for name in _NODE_PHASES)]
    originals = [(owner, name, getattr(owner, name)) for owner, name in replaced]
    chance = random.Random(case.seed * 7 + rank)

    def delayed(original: Any) -> Any:
        def run(plan: BucketBuffers) -> Any:
            if chance.random() < 0.3:
                time.sleep(chance.random() * 2e-3)
            return original(plan)

        return run

    for owner, name, original in originals if case.jitter else ():
        if owner is BucketBuffers:
            setattr(owner, name, delayed(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def lose_a_rank(
    rank: int, world_size: int, folder: str, seed: int, kind: str, nodes: int
) -> Report:
    """Run a case until one rank is lost at a random moment.

    Args:
        rank: This rank.
        world_size: How many there are.
        folder: For the rendezvous.
        seed: Of the case.
        kind: One of :data:`fuzz.cases.LOSSES`.
        nodes: Number of nodes in the hierarchical topology; 0 for a flat one.
    """
    watchdog.PATIENCE_S = 1.0
    chance = random.Random(seed)
    exits = "exits" in kind
    # That a rank is gone shows at once; that it is stopped, at the time-out.
    timeout_s = 4 if kind == "rank stopped" else 120
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{seed}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    pids: list[Any] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    case = draw(seed, world_size, "lost", nodes)
    _name_host(case, rank)
    phases = _PHASES + _NODE_PHASES if nodes else _PHASES
    countdown, name = chance.randint(1, 12), chance.choice(phases)
    # In topology "rank0" only rank 0 reduces.
    culprit = 0 if name == "reduce" and not exits else case.culprit
    if rank == culprit and not exits:
        number = signal.SIGKILL if kind == "rank killed" else signal.SIGSTOP
        original = getattr(BucketBuffers, name)

        def counted(plan: BucketBuffers) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown <= 0:
                os.kill(os.getpid(), number)
            return original(plan)

        setattr(BucketBuffers, name, counted)
    report = Report()
    run = _build(case, None)
    run.state.enabled = not exits or chance.random() < 0.7
    report.start(case)
    began = time.monotonic()
    try:
        if exits and rank == culprit:
            time.sleep(chance.random())
            os._exit(3)
        for step in range(40):
            began = time.monotonic()
            _step(case, rank, step, run, report)
    except Exception as error:
        report.error = f"{type(error).__name__}: {error}"
    report.seconds = time.monotonic() - began
    for _, residual in run.state.session.worker:
        report.is_finite &= bool(residual.isfinite().all())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[culprit], signal.SIGKILL)  # a stopped one would stay
    return report
