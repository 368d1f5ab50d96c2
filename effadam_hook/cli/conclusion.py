"""Conclusion of ``effadam bench``: real differences and noise, cost in quality, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from effadam_hook.cli.rows import Row, dense_method
from effadam_hook.planner.advice import code_for, select
from effadam_hook.planner.method import Method
from effadam_hook.planner.quality import describe_quality

__all__ = ["conclusion_of", "differs"]

_MIN_ROUNDS = 3


def differs(row: Row, dense: Row) -> bool:
    """Return whether a step differs from the dense one by more than the noise of the rounds.

    In every round the method must be on the same side of dense, and by more than dense itself varies
    between rounds.

    Args:
        row: The method.
        dense: The dense method with which it is compared.
    """
    noise = dense.slowest_round_ms / dense.fastest_round_ms
    return row.ratio_high * noise < 1 or row.ratio_low > noise


def conclusion_of(rows: Sequence[Row], is_local: bool) -> list[str]:
    """Describe what follows from a comparison.

    Args:
        rows: The measured methods.
        is_local: Whether the bytes passed through the loopback interface only.

    Returns:
        Sentences, in the order in which they are shown.
    """
    by_name = {row.method: row for row in rows}
    names = list(by_name)
    lines = []
    if is_local:
        lines.append(
            "All ranks are on this machine, so nothing passed through a network: these times say "
            "nothing about one. Start the command on every host."
        )
    if dense_method(names[0], names) is None:
        return [*lines, "There is no dense method to compare with: add fp32 to --methods."]
    dense = {row.method: by_name[dense_method(row.method, names) or ""] for row in rows}
    others = [row for row in rows if Method.parse(row.method).kind not in ("none", "dense")]
    lines += [_compare(row, dense[row.method]) for row in others]
    fewest = min(row.rounds for row in rows)
    if fewest < _MIN_ROUNDS:
        lines.append(
            f"{fewest} round{'s' * (fewest > 1)} can hide the noise of the machines: confirm with "
            f"--rounds {_MIN_ROUNDS} or more."
        )
    fastest_dense = min(row.median_ms for row in dense.values())
    real = [row for row in others if differs(row, dense[row.method])]
    chosen = select([(Method.parse(row.method), row.median_ms) for row in real], fastest_dense)
    if chosen is None:
        lines.append(
            "Keep DDP's own all-reduce: no method in gradient mode makes a step at least 10% shorter "
            "beyond the noise. Next: nothing to add."
        )
        return lines
    best = Method.parse(real[chosen].method)
    code = "; ".join(code_for(best).splitlines())
    lines += [
        f"Best of these: {best.name}. {describe_quality(best)}",
        f"Next: {code}",
    ]
    return lines


def _compare(row: Row, dense: Row) -> str:
    """Describe the difference of a method from dense."""
    if not differs(row, dense):
        return (
            f"{row.method}: {row.ratio:.2f} of {dense.method}, no difference beyond the noise (rounds "
            f"{row.ratio_low:.2f} to {row.ratio_high:.2f}; {_spread(dense)})."
        )
    kind = "faster" if row.ratio < 1 else "SLOWER"
    return (
        f"{row.method}: {row.ratio:.2f} of {dense.method}, {kind} (rounds {row.ratio_low:.2f} to "
        f"{row.ratio_high:.2f}; {_spread(dense)})."
    )


def _spread(dense: Row) -> str:
    varies = dense.slowest_round_ms / dense.fastest_round_ms - 1
    return f"{dense.method} itself varies by {varies:.0%} between rounds"
