"""Summary of measured cells, one row per method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from effadam_hook.cli.benchmark_run import Cell
from effadam_hook.planner.method import Method

__all__ = ["Row", "dense_method", "rows_of"]


@dataclass(frozen=True)
class Row:
    """Summary of one method.

    Attributes:
        method: Name of the method.
        median_ms: Median step time over all rounds.
        p20_ms: 20th percentile of the step time.
        p80_ms: 80th percentile of the step time.
        ratio: Step time relative to the dense method with the same buckets, or to the first dense
            method if there is none: the median over the rounds of the ratio of the medians. NaN
            without a dense method.
        ratio_low: Smallest ratio of a round.
        ratio_high: Largest ratio of a round.
        busiest_mb: Megabytes per step on the busiest link in its busier direction.
        total_mb: Megabytes per step that all hosts sent.
        cpu_ms: Processor time per step, all ranks together. Divided by the cores that the ranks share,
            it is a lower bound of the step time.
        slowest_round_ms: Maximum of the medians of the rounds.
        fastest_round_ms: Minimum of the medians of the rounds.
        rounds: Number of rounds.
    """

    method: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    busiest_mb: float
    total_mb: float
    cpu_ms: float
    slowest_round_ms: float
    fastest_round_ms: float
    rounds: int


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """Summarize cells.

    Args:
        cells: Cells of all rounds, in any order.

    Returns:
        One row per method, in the order of the first round.
    """
    by_method: dict[str, dict[int, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell["round"]):
        by_method.setdefault(cell["method"], {})[cell["round"]] = cell
    rows = []
    for method, rounds in by_method.items():
        steps = sorted(1e3 * s for cell in rounds.values() for s in cell["step_s"])
        medians = {number: _median_s(cell) for number, cell in rounds.items()}
        dense = by_method.get(dense_method(method, list(by_method)) or "", {})
        ratios = [medians[n] / _median_s(dense[n]) for n in medians if n in dense]
        last = rounds[max(rounds)]
        rows.append(
            Row(
                method,
                statistics.median(steps),
                steps[len(steps) // 5],
                steps[len(steps) * 4 // 5],
                statistics.median(ratios) if ratios else math.nan,
                min(ratios, default=math.nan),
                max(ratios, default=math.nan),
                max(*last["sent_bytes"], *last["received_bytes"]) / 1e6,
                sum(last["sent_bytes"]) / 1e6,
                1e3 * statistics.median(cell["cpu_s"] for cell in rounds.values()),
                1e3 * max(medians.values()),
                1e3 * min(medians.values()),
                len(medians),
            )
        )
    return rows


def dense_method(method: str, methods: Sequence[str]) -> str | None:
    """Select the dense method with which a method is compared.

    Args:
        method: Name of the method.
        methods: Names of all measured methods.

    Returns:
        Name of the dense method; None if no dense method was measured.
    """
    cap = Method.parse(method).bucket_mb
    dense = [name for name in methods if Method.parse(name).kind == "dense"]
    return next(
        (name for name in dense if Method.parse(name).bucket_mb == cap), next(iter(dense), None)
    )


def _median_s(cell: Cell) -> float:
    return statistics.median(cell["step_s"])
