"""``effadam plan``: measure link and kernels, predict every method's step, recommend one."""

from __future__ import annotations

import argparse
from typing import Any

from effadam_hook.cli.methods import read_methods
from effadam_hook.cli.ranks import Ranks, join_ranks, rank_here
from effadam_hook.cli.ui import Screen
from effadam_hook.errors import CommandError
from effadam_hook.kernels import choose
from effadam_hook.planner.advice import (
    Advice,
    advise,
    code_for,
    dense_for,
    dense_methods,
    forecast,
)
from effadam_hook.planner.measure_compute import measure_compute
from effadam_hook.planner.measure_link import MeasuredLink, measure_link, measurement_count
from effadam_hook.planner.measure_speed import measure_speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Compute, Prediction, Speed
from effadam_hook.planner.traffic import ParameterSize, square_model
from effadam_hook.planner.workloads import UserModel, Workload, describe, parse_count

__all__ = ["add_plan", "run_plan"]

_METHODS = "fp32,fp16,powersgd4,{lloyd4,lloyd3,lloyd2}/{sharded,rank0},update:lloyd2/sharded"
_FORWARD_SHARE = 1 / 3


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    model = parser.add_argument_group("model: one of these")
    model.add_argument("--parameters", metavar="N", help="number of parameters, for example 6.3M")
    model.add_argument("--model", metavar="MODULE:FUNCTION", help="function that returns the model")
    model.add_argument(
        "--mlp", metavar="LAYERSxWIDTHxROWS", help="a perceptron, for example 6x1024x32"
    )
    parser.add_argument(
        "--compute-ms",
        type=float,
        help="step time without communication (default: measured if the model can be run)",
    )
    parser.add_argument("--bucket-mb", type=float, help="DDP's bucket_cap_mb (default: 1, then 25)")
    parser.add_argument("--methods", default=_METHODS, help="method names (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_plan(args: argparse.Namespace) -> int:
    """Measure, predict, and print the recommendation."""
    screen = Screen(args.json, rank_here())
    methods = _methods(args)
    workload, parameters = _model(args)
    with join_ranks(args) as ranks:
        references = dense_methods(methods, args.bucket_mb)
        link, speeds, compute = _measure(
            args, screen, ranks, [*methods, *references], parameters, workload
        )
        cluster = _cluster(ranks, link)
        predictions = forecast(methods, parameters, cluster, speeds, compute)
        computed = forecast(references, parameters, cluster, {}, compute)
        dense = [_requested(predictions, one) for one in computed]
        advice = advise(predictions, *dense)
        _show(screen, ranks, link, predictions, dense, advice, compute)
        result = _result(ranks, link, speeds, compute, predictions, advice, parameters)
        screen.result({**result, "dense": [_as_dict(one) for one in dense]})
    return 0


def _cluster(ranks: Ranks, link: MeasuredLink) -> Cluster:
    return Cluster(
        ranks.probe.world_size,
        link.as_link(ranks.cpu_weight),
        cores=max(1.0, ranks.cores) if ranks.device.type == "cpu" else 1.0,
        tree=ranks.on_nccl,
        in_order=ranks.on_nccl,
    )


def _methods(args: argparse.Namespace) -> list[Method]:
    if args.compute_ms is not None and not args.compute_ms >= 0:
        raise CommandError(f"Invalid --compute-ms: {args.compute_ms}. Must be 0 or more.")
    return read_methods(args.methods, args.bucket_mb)


def _requested(predictions: list[Prediction], dense: Prediction) -> Prediction:
    """Return the equal prediction of a requested dense method, or ``dense`` if there is none."""
    requested = (p for p in predictions if p.method.kind == "dense")
    return next((p for p in requested if p.method.bucket_mb == dense.method.bucket_mb), dense)


def _model(args: argparse.Namespace) -> tuple[Workload | UserModel | None, list[ParameterSize]]:
    given = [name for name in ("parameters", "model", "mlp") if getattr(args, name) is not None]
    if len(given) != 1:
        raise CommandError(
            f"Given: {', '.join('--' + name for name in given) or 'no model'}. Must be exactly one of "
            "--parameters, --model and --mlp, for example --parameters 124M."
        )
    if args.parameters is not None:
        return None, square_model(parse_count(args.parameters))
    if args.model is not None:
        user = UserModel(args.model)
        return user, describe(user.model())
    try:
        layers, width, rows = (int(part) for part in args.mlp.split("x"))
    except ValueError as error:
        raise CommandError(
            f"Invalid --mlp: {args.mlp!r}. Must be LAYERSxWIDTHxROWS, for example 6x1024x32."
        ) from error
    perceptron = Workload(layers, width, rows)
    return perceptron, describe(perceptron.model())


def _measure(
    args: argparse.Namespace,
    screen: Screen,
    ranks: Ranks,
    methods: list[Method],
    parameters: list[ParameterSize],
    workload: Workload | UserModel | None,
) -> tuple[MeasuredLink, dict[str, Speed], Compute]:
    kinds = {method.arithmetic: method for method in methods if method.arithmetic}
    total = measurement_count(methods) + len(kinds) + 1
    with screen.progress("measuring", total) as advance:
        link = measure_link(ranks.probe, methods, parameters, advance, ranks.on_nccl)
        speeds = {}
        for name, method in kinds.items():
            advance(name)
            speeds[name] = measure_speed(
                ranks.probe, method, ranks.device, link.as_link().cpu_s, ranks.cpu_weight
            )
        advance("compute")
        return link, speeds, _compute(args, ranks, workload)


def _compute(
    args: argparse.Namespace, ranks: Ranks, workload: Workload | UserModel | None
) -> Compute:
    if args.compute_ms is not None:
        seconds = args.compute_ms / 1e3
        return Compute(seconds * _FORWARD_SHARE, seconds * (1 - _FORWARD_SHARE))
    if workload is None:
        return Compute()
    return measure_compute(ranks.probe, workload, args.bucket_mb, ranks.device)


def _show(
    screen: Screen,
    ranks: Ranks,
    link: MeasuredLink,
    predictions: list[Prediction],
    dense: list[Prediction],
    advice: Advice,
    compute: Compute,
) -> None:
    n = ranks.probe.world_size
    screen.note(
        f"{n} ranks over {ranks.backend}, {ranks.neighbours} on this machine, {ranks.device.type}; "
        f"kernels {choose(ranks.device).reason}"
    )
    screen.note(
        f"link: {link.payload_bytes_s * 8e-9:.3f} Gbit/s of payload in both directions at once, "
        f"{1e3 * link.latency_s:.3f} ms per message"
    )
    screen.table(
        "collectives",
        ("", "MB on the busiest link", "ms", "ms if empty", "x the link alone"),
        [
            (
                leg.name,
                f"{leg.busiest_bytes / 1e6:.3f}",
                f"{1e3 * leg.seconds:.2f}",
                f"{1e3 * leg.overhead_s:.2f}",
                f"{leg.slowdown:.2f}",
            )
            for leg in link.legs
        ],
    )
    if compute == Compute():
        screen.note("The compute time is unknown: a step is the exchange alone. Use --compute-ms.")
    else:
        parts = [1e3 * part for part in (compute.forward_s, compute.backward_s, compute.rest_s)]
        screen.note(
            f"compute: forward {parts[0]:.1f} ms, backward {parts[1]:.1f} ms, rest {parts[2]:.1f} ms"
        )
    screen.table(
        "predicted",
        ("method", "step ms", "x fp32", "exchange ms", "waits ms", "wire floor ms", "MB"),
        [
            (
                p.method.name.replace("fp32", "off (fp32)"),
                f"{1e3 * p.step_s:.1f}",
                f"{p.step_s / dense_for(p.method, dense).step_s:.3f}",
                f"{1e3 * p.exchange_s:.1f}",
                f"{1e3 * p.exposed_s:.1f}",
                f"{1e3 * p.floor_s:.1f}",
                f"{p.busiest_bytes / 1e6:.2f}",
            )
            for p in predictions
        ],
        marked=next((i for i, p in enumerate(predictions) if p is advice.best), None),
    )
    screen.note(advice.reason)
    screen.code(code_for(advice.best.method))


def _result(
    ranks: Ranks,
    link: MeasuredLink,
    speeds: dict[str, Speed],
    compute: Compute,
    predictions: list[Prediction],
    advice: Advice,
    parameters: list[ParameterSize],
) -> dict[str, Any]:
    return {
        "world_size": ranks.probe.world_size,
        "ranks_on_this_machine": ranks.neighbours,
        "cores_per_rank": ranks.cores,
        "backend": ranks.backend,
        "device": ranks.device.type,
        "kernels": choose(ranks.device).reason,
        "parameters": sum(p.numel for p in parameters),
        "link": link.to_dict(),
        "speeds": {name: vars(speed) for name, speed in speeds.items()},
        "compute": vars(compute),
        "predictions": [_as_dict(p) for p in predictions],
        "recommended": {
            "method": advice.best.method.name,
            "compression_pays": advice.pays,
            "reason": advice.reason,
            "code": code_for(advice.best.method),
        },
    }


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    method = prediction.method
    return {**vars(prediction), "method": method.name, "bucket_mb": method.bucket_mb}
