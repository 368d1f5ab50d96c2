"""What came out of measured cells, one row a method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from effadam_hook.cli.stepping import Cell
from effadam_hook.planner.method import Method

__all__ = ["Row", "dense_method", "rows_of"]


@dataclass(frozen=True)
class Row:
    """What came out for one method.

    Attributes:
        method: Its name.
        median_ms: Median time of a step over all rounds.
        p20_ms: A fifth of the steps took no longer than this.
        p80_ms: A fifth of the steps took no less than this.
        ratio: Against dense with the same buckets, or the first dense if there is none of them: the
            median over the rounds of the ratio of the round's medians; NaN without a dense method.
        busiest_mb: Megabytes a step on the busiest link in its busiest direction.
        total_mb: Megabytes a step that all hosts sent.
        cpu_ms: Processor time of a step, all ranks together; divided by the cores that they share, it
            is another floor.
        slowest_round_ms: The largest of the rounds' medians.
    """

    method: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    busiest_mb: float
    total_mb: float
    cpu_ms: float
    slowest_round_ms: float


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """Summarise cells.

    Args:
        cells: Of all rounds, in any order.

    Returns:
        One row a method, in the methods' order in the first round.
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
                statistics.median(ratios) if ratios else float("nan"),
                max(*last["sent_bytes"], *last["received_bytes"]) / 1e6,
                sum(last["sent_bytes"]) / 1e6,
                1e3 * statistics.median(cell["cpu_s"] for cell in rounds.values()),
                1e3 * max(medians.values()),
            )
        )
    return rows


def dense_method(method: str, methods: Sequence[str]) -> str | None:
    """The dense method that another is compared with.

    Args:
        method: Name of the method.
        methods: Names of all that were measured.

    Returns:
        Its name; None if no dense method was measured.
    """
    cap = Method.parse(method).bucket_mb
    dense = [name for name in methods if Method.parse(name).kind == "dense"]
    return next(
        (name for name in dense if Method.parse(name).bucket_mb == cap), next(iter(dense), None)
    )


def _median_s(cell: Cell) -> float:
    return statistics.median(cell["step_s"])
