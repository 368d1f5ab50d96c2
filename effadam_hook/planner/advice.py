"""From what was measured to predicted steps, and to a recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Compute, Prediction, Speed, predict
from effadam_hook.planner.traffic import Parameter
from effadam_hook.wire.quantizers import get_quantizer

__all__ = ["Advice", "advise", "code_for", "dense_for", "dense_methods", "forecast"]

_LEAST_GAIN = 0.10
"""A step must get this much shorter before another kind of exchange is worth its trouble."""
_LEAST_GAIN_OF_FEWER_BITS = 0.15
_NEAR_DENSE_BITS = 4.0


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        best: The recommended method's prediction.
        dense: That of the dense all-reduce with the same buckets.
        reason: Why, in words.
    """

    best: Prediction
    dense: Prediction
    reason: str

    @property
    def pays(self) -> bool:
        """Whether anything but the dense all-reduce is recommended."""
        return self.best.method != self.dense.method


def forecast(
    methods: Sequence[Method],
    parameters: Sequence[Parameter],
    cluster: Cluster,
    speeds: Mapping[str, Speed],
    compute: Compute,
) -> list[Prediction]:
    """Predict every method.

    Args:
        methods: Which.
        parameters: The model's.
        cluster: The ranks.
        speeds: By :attr:`Method.arithmetic <effadam_hook.planner.method.Method.arithmetic>`.
        compute: The step without communication.

    Returns:
        In the same order.
    """
    return [
        predict(method, parameters, cluster, speeds.get(method.arithmetic), compute)
        for method in methods
    ]


def dense_methods(methods: Sequence[Method], bucket_mb: float | None) -> list[Method]:
    """The dense all-reduces that methods are compared with.

    Args:
        methods: What is predicted.
        bucket_mb: DDP's ``bucket_cap_mb`` for what has no buckets to compare.

    Returns:
        One for every size of buckets among them.
    """
    caps = [s.bucket_mb for s in methods if s.kind not in ("none", "powersgd")] or [bucket_mb]
    dense = Method.parse("fp32")
    return [replace(dense, bucket_mb=cap) for cap in dict.fromkeys(caps)]


def dense_for(method: Method, dense: Sequence[Prediction]) -> Prediction:
    """The dense prediction to compare a method with.

    Args:
        method: The method.
        dense: Dense predictions, one for every size of buckets.

    Returns:
        That with the method's buckets; the fastest if there is none.
    """
    same = [p for p in dense if p.method.bucket_mb == method.bucket_mb]
    return min(same or dense, key=lambda p: p.step_s)


def advise(predictions: Sequence[Prediction], *dense: Prediction) -> Advice:
    """Recommend the method that changes training least among those that are about the fastest.

    Dense is kept unless a step gets 10 % shorter; fewer than four bits are taken only where they
    make it 15 % shorter than four bits and more do. Update mode and PowerSGD change what is trained,
    not only how it is sent: they are predicted and never recommended.

    Args:
        predictions: Of the methods to choose from.
        *dense: Of the dense all-reduce, for every size of buckets. A method must beat the fastest of
            them, and is compared with that of its own buckets.

    Returns:
        The advice.

    Raises:
        ValueError: If there is no dense prediction.
    """
    if not dense:
        raise ValueError("Invalid dense: none. Must be one prediction for every size of buckets.")
    fine = [p for p in predictions if _bits(p.method) >= _NEAR_DENSE_BITS]
    coarse = [p for p in predictions if 0 < _bits(p.method) < _NEAR_DENSE_BITS]
    fastest_dense = best = min(dense, key=lambda p: p.step_s)
    for candidates, gain in ((fine, _LEAST_GAIN), (coarse, _LEAST_GAIN_OF_FEWER_BITS)):
        fastest = min(candidates, key=lambda p: p.step_s, default=best)
        if fastest.step_s < (1 - gain) * best.step_s:
            best = fastest
    same = dense_for(best.method, dense)
    share = same.exposed_s / same.step_s
    if best is fastest_dense:
        return Advice(
            best,
            best,
            f"Compression does not pay here: a step waits {1e3 * best.exposed_s:.1f} ms of "
            f"{1e3 * best.step_s:.1f} ms for the dense all-reduce ({share:.0%}), and no method makes "
            f"it {_LEAST_GAIN:.0%} shorter. Leave DDP as it is.",
        )
    return Advice(
        best,
        same,
        f"{best.method.name} makes a step of {1e3 * best.step_s:.1f} ms out of one of "
        f"{1e3 * same.step_s:.1f} ms, {best.step_s / same.step_s:.2f} times as long. The dense step "
        f"waits {1e3 * same.exposed_s:.1f} ms for the network ({share:.0%}).",
    )


def _bits(method: Method) -> float:
    """Bits of an element, of the methods that can be recommended; 0 for the others."""
    if method.kind == "cast":
        return 16.0
    return get_quantizer(method.quantizer).bits if method.kind == "gradient" else 0.0


def code_for(method: Method) -> str:
    """The lines to paste.

    Args:
        method: What was recommended.

    Returns:
        Python; a comment for what needs no line.
    """
    cap = "" if method.bucket_mb is None else f", bucket_cap_mb={method.bucket_mb:g}"
    wrap = f"ddp_model = DistributedDataParallel(model{cap})\n" if cap else ""
    if method.kind == "cast":
        hook = f"{method.quantizer}_compress_hook"
        return (
            f"{wrap}ddp_model.register_comm_hook(None, torch.distributed.algorithms."
            f"ddp_comm_hooks.default_hooks.{hook})"
        )
    if method.kind == "gradient":
        return (
            f'{wrap}state = effadam_hook.attach(ddp_model, quantizer="{method.quantizer}", '
            f'topology="{method.topology}")'
        )
    return f"{wrap}# nothing to add: DDP's own all-reduce"
