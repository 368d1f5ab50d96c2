"""Predictions for several methods, and the recommendation that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Compute, Prediction, Speed, predict
from effadam_hook.planner.traffic import ParameterSize
from effadam_hook.wire.quantizers import get_quantizer

__all__ = [
    "Advice",
    "advise",
    "bits_of",
    "break_even_s",
    "code_for",
    "dense_for",
    "dense_methods",
    "forecast",
    "select",
]

_MIN_GAIN = 0.10
"""Minimum reduction of the step time, as a fraction, for which another method is recommended."""
_MIN_GAIN_OF_FEWER_BITS = 0.15
_NEAR_DENSE_BITS = 4.0
_HALVINGS = 8
FORWARD_SHARE = 1 / 3
"""Share of the forward pass in a compute time of which only the total is known."""


@dataclass(frozen=True)
class Advice:
    """Recommendation of a method.

    Attributes:
        best: Prediction for the recommended method.
        dense: Prediction for the dense all-reduce with the same buckets.
        reason: Reason for the recommendation, as text.
    """

    best: Prediction
    dense: Prediction
    reason: str

    @property
    def pays(self) -> bool:
        """Return whether a method other than the dense all-reduce is recommended."""
        return self.best.method != self.dense.method


def forecast(
    methods: Sequence[Method],
    parameters: Sequence[ParameterSize],
    cluster: Cluster,
    speeds: Mapping[str, Speed],
    compute: Compute | None,
) -> list[Prediction]:
    """Predict the step time of every method.

    Args:
        methods: The methods.
        parameters: Sizes of the trained parameters, in the model's order.
        cluster: The ranks.
        speeds: Durations of the arithmetic, by
            :attr:`Method.arithmetic <effadam_hook.planner.method.Method.arithmetic>`.
        compute: Durations of the step without communication; None for zero.

    Returns:
        The predictions, in the order of the methods.
    """
    return [
        predict(method, parameters, cluster, speeds.get(method.arithmetic), compute)
        for method in methods
    ]


def dense_methods(methods: Sequence[Method], bucket_mb: float | None) -> list[Method]:
    """List the dense all-reduces with which methods are compared.

    Args:
        methods: The methods that are predicted.
        bucket_mb: DDP's ``bucket_cap_mb`` if no method uses DDP's buckets.

    Returns:
        One dense method for every bucket size among the methods.
    """
    caps = [m.bucket_mb for m in methods if m.kind not in ("none", "powersgd")] or [bucket_mb]
    dense = Method.parse("fp32")
    return [replace(dense, bucket_mb=cap) for cap in dict.fromkeys(caps)]


def dense_for(method: Method, dense: Sequence[Prediction]) -> Prediction:
    """Select the dense prediction with which a method is compared.

    Args:
        method: The method.
        dense: Dense predictions, one for every bucket size.

    Returns:
        The prediction with the method's bucket size, or the fastest if there is none.
    """
    same = [p for p in dense if p.method.bucket_mb == method.bucket_mb]
    return min(same or dense, key=lambda p: p.step_s)


def advise(predictions: Sequence[Prediction], *dense: Prediction) -> Advice:
    """Recommend the method that affects training least among those that are nearly the fastest.

    The dense all-reduce is recommended unless a method makes a step 10 % shorter. Fewer than four bits
    are recommended only if they make a step 15 % shorter than methods with four or more bits do. Update
    mode and PowerSGD change the optimization itself, so they are predicted but never recommended.

    Args:
        predictions: Predictions for the candidate methods.
        *dense: Predictions for the dense all-reduce, one for every bucket size. A method must be faster
            than all of them. The reason compares it with the one of its own bucket size.

    Returns:
        The recommendation.

    Raises:
        ValueError: If there is no dense prediction.
    """
    if not dense:
        raise ValueError("Invalid dense: none. Must be one prediction for every bucket size.")
    fastest_dense = min(dense, key=lambda p: p.step_s)
    chosen = select([(p.method, p.step_s) for p in predictions], fastest_dense.step_s)
    best = fastest_dense if chosen is None else predictions[chosen]
    same = dense_for(best.method, dense)
    share = same.exposed_s / same.step_s
    if best is fastest_dense:
        return Advice(
            best,
            best,
            f"Compression does not pay here: a step waits {1e3 * best.exposed_s:.1f} ms of "
            f"{1e3 * best.step_s:.1f} ms for the dense all-reduce ({share:.0%}), and no method that "
            f"can be recommended makes the step {_MIN_GAIN:.0%} shorter. Keep DDP's own all-reduce.",
        )
    return Advice(
        best,
        same,
        f"{best.method.name} shortens a step from {1e3 * same.step_s:.1f} ms to "
        f"{1e3 * best.step_s:.1f} ms, {best.step_s / same.step_s:.2f} times the dense time. The dense "
        f"step waits {1e3 * same.exposed_s:.1f} ms for the network ({share:.0%}).",
    )


def select(steps: Sequence[tuple[Method, float]], dense_s: float) -> int | None:
    """Select the method to recommend, by the rule of :func:`advise`.

    Args:
        steps: Methods and the seconds of their steps.
        dense_s: Seconds of the fastest dense step.

    Returns:
        Index of the method; None for the dense all-reduce.
    """
    best, best_s = None, dense_s
    for is_fine, gain in ((True, _MIN_GAIN), (False, _MIN_GAIN_OF_FEWER_BITS)):
        candidates = [
            (seconds, index)
            for index, (method, seconds) in enumerate(steps)
            if bits_of(method) and (bits_of(method) >= _NEAR_DENSE_BITS) == is_fine
        ]
        seconds, index = min(candidates, default=(best_s, -1))
        if seconds < (1 - gain) * best_s:
            best, best_s = index, seconds
    return best


def break_even_s(
    advice: Advice,
    dense: Sequence[Prediction],
    parameters: Sequence[ParameterSize],
    cluster: Cluster,
    speeds: Mapping[str, Speed],
) -> float:
    """Compute up to which compute time of a step the recommended method pays.

    Args:
        advice: A recommendation other than dense, for a compute time of zero.
        dense: Predictions for the dense all-reduce, one for every bucket size: the fastest decides.
        parameters: Sizes of the trained parameters, in the model's order.
        cluster: The ranks.
        speeds: See :func:`forecast`.

    Returns:
        Seconds of computing, a third of it forward, above which the step is not 10 % shorter.
    """

    def pays(compute_s: float) -> bool:
        compute = Compute(compute_s * FORWARD_SHARE, compute_s * (1 - FORWARD_SHARE))
        methods = [advice.best.method, *(one.method for one in dense)]
        ours, *others = forecast(methods, parameters, cluster, speeds, compute)
        return ours.step_s < (1 - _MIN_GAIN) * min(one.step_s for one in others)

    low, high = 0.0, max(one.exchange_s for one in dense) / _MIN_GAIN * 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def bits_of(method: Method) -> float:
    """Return the bits per element of a method that can be recommended; 0 for other methods.

    Args:
        method: The method.
    """
    if method.kind == "cast":
        return 16.0
    return get_quantizer(method.quantizer).bits if method.kind == "gradient" else 0.0


def code_for(method: Method) -> str:
    """Return the code that applies a method.

    Args:
        method: The recommended method.

    Returns:
        Lines of Python; a comment if the method needs no code.
    """
    cap = "" if method.bucket_mb is None else f", bucket_cap_mb={method.bucket_mb:g}"
    wrap = f"ddp_model = DistributedDataParallel(model{cap})\n" if cap else ""
    if method.kind == "cast":
        hook = f"default_hooks.{method.quantizer}_compress_hook"
        if method.quantizer == "bf16":  # DDP refuses torch's own hook by its name on Gloo
            hook = f"lambda state, bucket: {hook}(state, bucket)"
        return (
            "from torch.distributed.algorithms.ddp_comm_hooks import default_hooks\n\n"
            f"{wrap}ddp_model.register_comm_hook(None, {hook})"
        )
    if method.kind == "gradient":
        few = ""
        if bits_of(method) < 4:
            few = f'betas = effadam_hook.reduced_betas((0.9, 0.999), "{method.quantizer}")\n'
        return (
            f'{few}{wrap}state = effadam_hook.attach(ddp_model, quantizer="{method.quantizer}", '
            f'topology="{method.topology}")'
        )
    return f"{wrap}# nothing to add: DDP's own all-reduce"
