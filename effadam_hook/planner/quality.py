"""Measured cost of a method in quality, in words.

The numbers are those of "Loss by bits" in docs/benchmarks.md, and of "What was measured" in
docs/algorithm.md: final validation loss of the text example, 4 workers, mean of three seeds. Gradient
mode was measured with the learning rate of dense DDP, and with its momentum and that of
``reduced_betas``; update mode with local second moments and its own settings.
"""

from __future__ import annotations

from effadam_hook.planner.method import Method

__all__ = ["DENSE_LOSS", "DENSE_SPREAD", "LOSSES", "REDUCED_LOSSES", "describe_quality"]

DENSE_LOSS = {"gradient": 1.5970, "update": 1.5404}
"""Loss of dense DDP in the same setting, by kind of the method."""
DENSE_SPREAD = {"gradient": 0.0236, "update": 0.0230}
"""Largest loss of a dense seed minus the smallest, by kind of the method."""
LOSSES = {
    "gradient": {"lloyd4": 1.5993, "lloyd3": 1.6091, "lloyd2": 1.6526},
    "update": {
        "lloyd4": 1.5364,
        "lloyd3": 1.5408,
        "lloyd2": 1.5488,
        "ternary": 1.5615,
        "sign": 1.554,
    },
}
"""Loss by kind and quantizer."""
REDUCED_LOSSES = {"gradient": {"lloyd2": 1.5564}}
"""Loss with the momentum of ``reduced_betas``, by kind and quantizer."""

_HALF, _WHOLE = 0.5, 1.2


def describe_quality(method: Method) -> str:
    """Describe what a method costs in quality.

    Args:
        method: The method.

    Returns:
        One or two sentences; empty for methods that average exactly.
    """
    if method.kind in ("none", "dense"):
        return ""
    if method.kind == "cast":
        return f"Quality: {method.quantizer} rounds what is sent, without error feedback; not measured."
    loss = LOSSES.get(method.kind, {}).get(method.quantizer)
    if loss is None:
        return (
            f"Quality: {method.name} has no measured loss in this mode. Compare final losses with "
            "dense before you rely on it; see docs/modes.md."
        )
    cost, spread = loss - DENSE_LOSS[method.kind], DENSE_SPREAD[method.kind]
    if cost <= _HALF * spread:
        size = "less than the seed changes"
    elif cost <= _WHOLE * spread:
        size = "about as much as another seed"
    else:
        size = "more than the seed changes: a clear loss"
    tuned = " It needs EfficientAdam; measured with tuned rates and momentum." * (
        method.kind == "update"
    )
    dense = DENSE_LOSS[method.kind]
    reduced = REDUCED_LOSSES.get(method.kind, {}).get(method.quantizer, dense) - dense
    remedy = f" With effadam_hook.reduced_betas it ends {reduced:+.4f} from dense." * bool(reduced)
    return (
        f"Quality: on the text example {method.quantizer} ends {cost:+.4f} nats from dense, whose "
        f"seeds differ by {spread:.3f}; {size}.{tuned}{remedy} Your model may differ: compare final "
        "losses."
    )
