"""Checks that nothing was lost: what arrived and what the residuals hold is what was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fuzz.cases import Case, gradients

if TYPE_CHECKING:
    from fuzz.ranks import Report

__all__ = ["missing"]

_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}


def missing(case: Case, reports: list[Report]) -> Iterator[str]:
    """Compare what was given with what arrived.

    Args:
        case: The run, which ended by itself.
        reports: Of all ranks.

    Yields:
        What is missing, in words.
    """
    if case.is_huge or case.dtype not in _TOLERANCE or not case.options["error_feedback"]:
        return  # what saturation, short numbers and no error feedback lose is lost on purpose
    if case.updates:
        # Dense steps, shared moments and join() mix the ranks' moments.
        local = case.optimizer_options["second_moment"] == "local"
        is_dense = case.options["warmup_steps"] or case.switched
        if local and not is_dense and not case.batches:
            yield from _missing_updates(case, reports)
    else:
        yield from _missing_gradients(case, reports)


def _missing_gradients(case: Case, reports: list[Report]) -> Iterator[str]:
    """The sums of what arrived plus the residuals are the sums of the mean gradients."""
    poisoned = {p for _, p, _ in case.poisoned.values()}
    longest = max(reports, key=lambda report: len(report.digests))
    for p in range(len(case.shapes)):
        if p in poisoned:
            continue
        given = sum(report.given[p] for report in reports).flatten() / len(reports)
        size = max(float(report.given[p].abs().max()) for report in reports)
        total = longest.arrived[p].flatten() + _residual(case, reports, p, 1, 1)
        yield from _compare(case, p, total, given, max(size, float(given.abs().max())))


def _missing_updates(case: Case, reports: list[Report]) -> Iterator[str]:
    """Weights less residuals move by the mean of the workers' updates, and by nothing else."""
    expected = _expected_weights(case, len(reports))
    for p in range(len(case.shapes)):
        # A server that keeps the weights holds what the quantized ones lack, not what was not sent.
        server = 1 if case.mode == "weights" else -1
        total = reports[0].weights[p].double().flatten() + _residual(case, reports, p, -1, server)
        yield from _compare(case, p, total, expected[p].flatten(), case.optimizer_options["lr"])


def _residual(case: Case, reports: list[Report], p: int, worker: int, server: int) -> Tensor:
    """The workers' mean residual and the servers', each with a sign."""
    key, total = f"weights.{p}", torch.zeros(reports[0].given[p].numel(), dtype=torch.float64)
    for report in reports:
        saved = {
            side: _by_name(report.saved[side]) for side in ("worker", "server", "server_start")
        }
        if key in saved["worker"]:
            start = _by_name(report.saved.get("worker_start", {})).get(key, 0)
            values = saved["worker"][key].double() / len(case.workers(len(reports)))
            total[start : start + values.numel()] += worker * values
        if key in saved["server"]:
            start, share = saved["server_start"][key], saved["server"][key]
            total[start : start + share.numel()] += server * share.double()
    return total


def _by_name(table: dict[str, Any]) -> dict[str, Any]:
    """Without the names of wrappers."""
    return {name[name.index("weights.") :]: value for name, value in table.items()}


def _compare(case: Case, p: int, total: Tensor, wanted: Tensor, size: float) -> Iterator[str]:
    largest = max(size, 1e-30) * case.steps
    error = float((total - wanted).abs().max()) / largest
    if not error <= _TOLERANCE[case.dtype]:  # a NaN is none
        yield f"parameter {p}, {case.shapes[p]}: {error:.2g} of it is missing"


def _expected_weights(case: Case, world_size: int) -> list[Tensor]:
    """From zero, less the mean of the updates of an Adam on every worker: a rank, or a node.

    A parameter is stepped where it has a gradient: where some rank uses it, or where one of an earlier
    step was filled with zeros. A rank that does not use it then has a gradient of zero.
    """
    workers = case.workers(world_size)
    beta1, beta2, eps, lr = 0.9, 0.999, 1e-8, case.optimizer_options["lr"]
    weights = [torch.zeros(shape, dtype=torch.float64) for shape in case.shapes]
    firsts = [[torch.zeros_like(w) for w in weights] for _ in workers]
    seconds = [[torch.zeros_like(w) for w in weights] for _ in workers]
    counts, has_gradient = [0] * len(weights), [False] * len(weights)
    for step in range(case.steps):
        if step == case.resumed:
            has_gradient = [False] * len(weights)
        given = [gradients(case, rank, step) for rank in range(world_size)]
        for p, weight in enumerate(weights):
            is_used = any(chosen[p] is not None for chosen in given)
            has_gradient[p] = is_used or (has_gradient[p] and not case.set_to_none)
            if not has_gradient[p]:
                continue
            counts[p] += 1
            correction1, correction2 = 1 - beta1 ** counts[p], 1 - beta2 ** counts[p]
            for worker, ranks in enumerate(workers):
                g = torch.zeros_like(weight)
                for own in (given[rank][p] for rank in ranks):
                    g += 0 if own is None else own.double() / len(ranks)
                m, v = firsts[worker][p], seconds[worker][p]
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                update = lr * (m / correction1) / ((v / correction2).sqrt() + eps)
                weight.sub_(update / len(workers))
    return weights
