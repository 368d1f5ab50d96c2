"""Training on several ranks: on one GPU over Gloo, and over NCCL with a rank for each GPU."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effadam_hook import EfficientAdam, attach
from gpu_check.device import device_of
from gpu_check.outcome import FAILED, SKIPPED, Checks, Context, require
from harness import RankError, run_ranks
from training import ChosenGradients, ddp, drawn_gradients

__all__ = ["Case", "compare", "held_back", "run_gloo", "run_nccl", "trained"]

STEPS = 12
MODES = ("gradient", "preconditioned", "update")
QUANTIZER = "lloyd4"
# Implementations on the CPU agree to .00001. A code that differs at a tie changes about .001.
LARGEST_DIFFERENCE = 0.01
LARGEST_LOSS = 1e-5
STARTUP_S = 40.0


@dataclass(frozen=True)
class Case:
    """A run on several ranks.

    Attributes:
        world_size: Number of ranks.
        topology: The topology; "hierarchical" has two nodes.
        mode: What is exchanged; "dense" leaves the hook disabled, "none" sends the gradient in float32,
            "join" is gradient mode with a step less on each rank than on the one before.
    """

    world_size: int
    topology: str
    mode: str

    def __str__(self) -> str:
        return f"{self.topology}, {self.mode}"


Train = Callable[[int, torch.device, Case], dict[str, Any]]


def run_gloo(context: Context) -> Checks:
    """Train with 2 and 4 ranks on one GPU over Gloo, in all topologies and modes."""
    checks = Checks()
    of_two = [Case(2, topology, mode) for topology in ("rank0", "sharded") for mode in MODES]
    of_four = [
        *(Case(4, topology, "gradient") for topology in ("rank0", "sharded")),
        *(Case(4, "hierarchical", mode) for mode in ("gradient", "update")),
    ]
    if context.device == "cpu":
        of_two, of_four = of_two[:3], of_four[2:3]
    for cases in (of_two + plain(2), of_four):
        compare(checks, context, "gloo", cases, f"on one {context.device}")
    return checks


def run_nccl(context: Context) -> Checks:
    """Train over NCCL (RCCL on AMD), with a rank for each GPU; over Gloo in a trial."""
    checks = Checks()
    device = device_of(context.device)
    if device.is_gpu and device.backend != "nccl":
        reason = "torch.distributed.is_nccl_available() is False: this torch was built without NCCL"
        checks.add("training over NCCL", SKIPPED, reason)
        return checks
    count = device.count
    cases = [Case(count, topology, mode) for topology in ("rank0", "sharded") for mode in MODES]
    if count >= 4 and count % 2 == 0:
        cases += [Case(count, "hierarchical", mode) for mode in ("gradient", "update")]
    cases = cases + plain(count) if device.is_gpu else cases[:1]
    compare(checks, context, device.backend, cases, f"over {device.backend}")
    if count == 1:
        reason = "torch.cuda.device_count() is 1: NCCL has one rank here, and nothing travels"
        checks.add("NCCL between GPUs", SKIPPED, reason)
    return checks


def plain(world_size: int) -> list[Case]:
    """Return the cases without quantizers, and one of ranks that run out of data."""
    return [
        Case(world_size, "rank0", "dense"),
        *(Case(world_size, topology, "none") for topology in ("rank0", "sharded")),
        *(Case(world_size, topology, "join") for topology in ("rank0", "sharded")),
    ]


def compare(
    checks: Checks,
    context: Context,
    backend: str,
    cases: Sequence[Case],
    where: str,
    train: Train | None = None,
) -> None:
    """Train all cases on the device and on the CPU; an error in one of them leaves the others."""
    while cases:
        name = f"{cases[0].world_size} ranks {where}"
        if context.left_s < 1:
            checks.add(f"{name}, from {cases[0]} on", SKIPPED, "the time of the section is over")
            return
        limit_s = max(STARTUP_S, context.left_s)
        ours, error = trained(context.device, backend, cases, limit_s, train)
        law: dict[Case, list[dict[str, Any]]] = {}
        if ours:
            limit_s = max(STARTUP_S, context.left_s)
            law, _ = trained("cpu", "gloo", list(ours), limit_s, train)
        for case, results in ours.items():
            expected = law.get(case)
            checks.run(f"{name}, {case}", lambda r=results, e=expected: judge(r, e))
        if not error:
            return
        checks.add(f"{name}, {cases[len(ours)]}", FAILED, error)
        cases = cases[len(ours) + 1 :]


def trained(
    device: str, backend: str, cases: Sequence[Case], limit_s: float, train: Train | None = None
) -> tuple[dict[Case, list[dict[str, Any]]], str]:
    """Train cases one after the other on the same ranks.

    Returns:
        Results by rank of the cases that all ranks have finished, and the error that ended the others.
    """
    world_size, error = cases[0].world_size, ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ranks(
                train_all,
                world_size,
                device,
                list(cases),
                folder,
                train or train_ddp,
                backend=backend,
                timeout=limit_s,
                fresh=device == "cuda",  # a process that is forked cannot use CUDA
            )
        except (RankError, TimeoutError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        results: dict[Case, list[dict[str, Any]]] = {}
        for number, case in enumerate(cases):
            paths = [result_path(folder, number, rank) for rank in range(world_size)]
            if not all(path.exists() for path in paths):
                break
            results[case] = [torch.load(path, weights_only=True) for path in paths]
    if error and len(results) == len(cases):  # at the end of the processes
        results.pop(cases[-1])
    return results, error


def result_path(folder: str, number: int, rank: int) -> Path:
    return Path(folder) / f"{number}.{rank}.pt"


def train_all(
    rank: int, world_size: int, device: str, cases: list[Case], folder: str, train: Train
) -> None:
    """Train all cases on a rank, and write the results of each."""
    where = torch.device("cpu")
    if device == "cuda":
        nccl = torch.distributed.get_backend() == "nccl"
        where = torch.device("cuda", rank if nccl else 0)
        torch.cuda.set_device(where)
    for number, case in enumerate(cases):
        print(f"case {number}: {case}", flush=True)  # shown when a rank fails
        result = train(rank, where, case)
        path = result_path(folder, number, rank)
        torch.save(result, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)


def train_ddp(rank: int, where: torch.device, case: Case) -> dict[str, Any]:
    """Train on gradients that do not depend on weights, and return what the rank has.

    Returns:
        ``weights``, ``state``, ``ratio``, and if the mode exchanges gradients of all ranks ``arrived``,
        the sum of the results.
    """
    model = ddp(
        ChosenGradients().to(where), device_ids=None if where.type == "cpu" else [where.index]
    )
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"quantizer": QUANTIZER, "topology": case.topology}
    if case.topology == "hierarchical":
        options["device_mesh"] = (2, case.world_size // 2)
    if case.mode == "update":
        optimizer = options["optimizer"] = EfficientAdam(model.parameters(), lr=1e-3)
    elif case.mode == "preconditioned":
        options |= {"optimizer": optimizer, "precondition": True}
    elif case.mode == "none":
        options["quantizer"] = "none"
    state = attach(model, enabled=case.mode != "dense", **options)
    arrived = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    joins = case.mode == "join"
    with model.join() if joins else contextlib.nullcontext():
        for step in range(STEPS - rank if joins else STEPS):
            optimizer.zero_grad()
            model([g.to(where) for g in drawn_gradients(rank, step)]).backward()
            for index, parameter in enumerate(model.parameters()):
                arrived[index] += parameter.grad.cpu()
            optimizer.step()
    found = {
        "weights": torch.cat([p.detach().flatten().cpu() for p in model.parameters()]),
        "state": state.state_dict(),
        "ratio": float(state.stats()["ratio"]),
    }
    if case.mode in ("gradient", "dense", "none") and case.topology != "hierarchical":
        found["arrived"] = arrived
    return found


def judge(ours: list[dict[str, Any]], law: list[dict[str, Any]] | None) -> str:
    """Compare replicas to the bit, results with what was sent, and weights with the CPU's."""
    weights = ours[0]["weights"]
    require(bool(weights.isfinite().all()), "weights are not finite")
    for rank, one in enumerate(ours):
        differ = int((one["weights"] != weights).sum())
        require(differ == 0, f"rank {rank} has {differ} other weights than rank 0. Must be equal.")
    said = []
    if "arrived" in ours[0]:
        lost = lost_share(ours)
        require(
            lost < LARGEST_LOSS,
            f"results and residuals differ from the gradients by {lost:.1e}. "
            f"Must be below {LARGEST_LOSS:g}.",
        )
        said.append(f"{lost:.0e} of the gradients lost")
    require(
        law is not None, "the ranks on the CPU have failed, so there is nothing to compare with"
    )
    assert law is not None
    # All weights begin as zeros.
    share = float((weights - law[0]["weights"]).norm() / law[0]["weights"].norm())
    require(
        share < LARGEST_DIFFERENCE,
        f"weights differ from the CPU's by {share:.2%}. Must be below {LARGEST_DIFFERENCE:.0%}.",
    )
    said.append(f"weights within {share:.3%} of the CPU's")
    return f"{', '.join(said)}, {ours[0]['ratio']:.1f} times fewer bytes"


def lost_share(ranks: list[dict[str, Any]]) -> float:
    """Return how far results and residuals are from the sum of the mean gradients, at most."""
    held = held_back([one["state"] for one in ranks])
    worst = 0.0
    for index, arrived in enumerate(ranks[0]["arrived"]):
        given = sum(
            (
                drawn_gradients(rank, step)[index].double() / len(ranks)
                for rank in range(len(ranks))
                for step in range(STEPS)
            ),
            torch.zeros_like(arrived),
        )
        total = arrived.flatten() + held.get(f"weights.{index}", 0.0)
        worst = max(worst, float((total - given.flatten()).abs().max() / given.abs().max()))
    return worst


def held_back(states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the residuals of all ranks, as the mean of the workers' and the sum of the servers'.

    Args:
        states: ``state_dict()`` of each rank.

    Returns:
        ``[numel]`` in float64 by parameter.
    """
    held: dict[str, Tensor] = {}
    for state in states:
        for name, residual in state["worker"].items():
            flat = residual.flatten().double() / len(states)
            held[name] = held[name] + flat if name in held else flat
    for state in states:
        for name, share in state["server"].items():
            start = int(state["server_start"][name])
            held[name][start : start + share.numel()] += share.flatten().double()
    return held
