"""``effadam plan``: measure link and kernels, predict every method's step, recommend one."""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import replace

from effadam_hook.cli.methods import read_methods
from effadam_hook.cli.plan_output import Plan, result_of, show
from effadam_hook.cli.ranks import (
    Ranks,
    alone,
    check_launched,
    is_launched,
    join_ranks,
    overload,
    rank_here,
)
from effadam_hook.cli.ui import Screen
from effadam_hook.errors import CommandError
from effadam_hook.planner.advice import FORWARD_SHARE, advise, dense_methods, forecast
from effadam_hook.planner.copying import copying_speed
from effadam_hook.planner.measure_compute import measure_compute
from effadam_hook.planner.measure_link import MeasuredLink, measure_link, measurement_count
from effadam_hook.planner.measure_speed import measure_speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Compute, Link, Prediction, Speed
from effadam_hook.planner.traffic import ParameterSize, square_model
from effadam_hook.planner.workloads import UserModel, Workload, describe, parse_count

__all__ = ["add_plan", "run_plan"]

_METHODS = "fp32,fp16,powersgd4,{lloyd4,lloyd3,lloyd2},lloyd4/{sharded,rank0},update:lloyd2"
_LATENCY_S = 5e-5


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    model = parser.add_argument_group("model: one of these")
    model.add_argument("--parameters", metavar="N", help="number of parameters, for example 6.3M")
    model.add_argument("--model", metavar="MODULE:FUNCTION", help="function that returns the model")
    model.add_argument(
        "--mlp", metavar="LAYERSxWIDTHxROWS", help="a perceptron, for example 6x1024x32"
    )
    cluster = parser.add_argument_group("without a launcher: calculate for a cluster you describe")
    cluster.add_argument("--nodes", type=int, help="number of nodes")
    cluster.add_argument(
        "--ranks-per-node", type=int, default=1, help="ranks that share a node's network card"
    )
    cluster.add_argument("--gbit", type=float, help="Gbit/s of each node's network card")
    cluster.add_argument(
        "--inside-gbit", type=float, help="Gbit/s of a rank inside its node (default: never limits)"
    )
    cluster.add_argument(
        "--copy-gbyte",
        type=float,
        help="GB/s that a GPU of the nodes copies, for example 2000: kernels are then calculated from "
        "it, and not measured on this machine",
    )
    parser.add_argument(
        "--compute-ms",
        type=float,
        help="step time without communication (default: measured if the model can be run)",
    )
    parser.add_argument(
        "--bucket-mb",
        type=float,
        help="DDP's bucket_cap_mb (default: DDP's, a first bucket of 1 MB, then 25)",
    )
    parser.add_argument("--methods", default=_METHODS, help="method names (default %(default)s)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the model (default: cuda if every local rank has a GPU)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run_plan(args: argparse.Namespace) -> int:
    """Measure, predict, and print the recommendation."""
    screen = Screen(args.json, rank_here())
    requested = _methods(args)
    workload, parameters = _model(args)
    load = overload() if args.copy_gbyte is None else None
    with _ranks(args) as ranks:
        per_node = args.ranks_per_node if ranks.is_alone else ranks.ranks_per_node
        methods = _on_nodes(requested, per_node)
        references = dense_methods(methods, args.bucket_mb)
        link, speeds = _measure(args, screen, ranks, [*methods, *references], parameters, per_node)
        compute = _compute(args, ranks, workload)
        cluster = _described(args, ranks) if link is None else _cluster(ranks, link)
        predictions = forecast(methods, parameters, cluster, speeds, compute)
        computed = forecast(references, parameters, cluster, {}, compute)
        dense = [_requested(predictions, one) for one in computed]
        advice = advise(predictions, *dense)
        plan = Plan(
            ranks,
            cluster,
            link,
            speeds,
            compute,
            parameters,
            predictions,
            dense,
            advice,
            load,
            args.copy_gbyte,
        )
        show(screen, plan)
        screen.result(result_of(plan))
    return 0


def _ranks(args: argparse.Namespace) -> contextlib.AbstractContextManager[Ranks]:
    """Join the launcher's ranks, or stay alone if the cluster is described by the arguments."""
    described = ("nodes", "gbit", "inside_gbit", "copy_gbyte")
    given = [name for name in described if getattr(args, name) is not None]
    given += ["ranks_per_node"] * (args.ranks_per_node != 1)
    if not given:
        check_launched("plan", "or add --nodes and --gbit to calculate without one")
        return join_ranks(args)
    names = ", ".join("--" + name.replace("_", "-") for name in given)
    if is_launched():
        raise CommandError(
            f"Given under a launcher: {names}. Under a launcher nodes and links are measured: leave "
            "them out, or start one process without a launcher."
        )
    if args.nodes is None or args.gbit is None:
        raise CommandError(
            f"Given: {names}. Without a launcher --nodes and --gbit must both be given, for example "
            "--nodes 4 --ranks-per-node 8 --gbit 25."
        )
    if args.nodes < 2 or args.ranks_per_node < 1:
        raise CommandError(
            f"Invalid --nodes and --ranks-per-node: {args.nodes}, {args.ranks_per_node}. Must be at "
            "least 2 and 1."
        )
    for name in ("gbit", "inside_gbit", "copy_gbyte"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise CommandError(
                f"Invalid --{name.replace('_', '-')}: {value}. Must be above 0 and finite."
            )
    return alone(args)


def _described(args: argparse.Namespace, ranks: Ranks) -> Cluster:
    """Return the cluster that the arguments describe."""
    inside = None
    if args.inside_gbit is not None and args.ranks_per_node > 1:
        inside = Link(args.inside_gbit * 1e9 / 8, efficiency=1.0)
    on_nccl = ranks.on_nccl or args.copy_gbyte is not None
    return Cluster(
        args.nodes * args.ranks_per_node,
        Link(args.gbit * 1e9 / 8, latency_s=_LATENCY_S),
        cores=1.0 if on_nccl else _free_cores(ranks),
        on_nccl=on_nccl,
        ranks_per_node=args.ranks_per_node,
        inside=inside,
    )


def _cluster(ranks: Ranks, link: MeasuredLink) -> Cluster:
    return Cluster(
        ranks.probe.world_size,
        link.as_link(ranks.cpu_weight),
        cores=_free_cores(ranks),
        on_nccl=ranks.on_nccl,
        ranks_per_node=ranks.ranks_per_node,
        inside=link.inside(),
    )


def _free_cores(ranks: Ranks) -> float:
    return max(1.0, ranks.cores) if ranks.device.type == "cpu" else 1.0


def _methods(args: argparse.Namespace) -> list[Method]:
    if args.compute_ms is not None and not 0 <= args.compute_ms < math.inf:
        raise CommandError(
            f"Invalid --compute-ms: {args.compute_ms}. Must be 0 or more, and finite."
        )
    return read_methods(args.methods, args.bucket_mb)


def _on_nodes(methods: list[Method], ranks_per_node: int) -> list[Method]:
    """Return the methods with their topologies on these nodes, without those that are then equal."""
    here: dict[Method, Method] = {}
    for method in (one.on_nodes(ranks_per_node) for one in methods):
        here.setdefault(replace(method, name=""), method)
    return list(here.values())


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
    ranks_per_node: int,
) -> tuple[MeasuredLink | None, dict[str, Speed]]:
    """Measure the link, unless this rank is alone, and the arithmetic of every method."""
    kinds = {method.arithmetic: method for method in methods if method.arithmetic}
    if args.copy_gbyte is not None:
        rate = 1e9 * args.copy_gbyte
        return None, {
            name: copying_speed(method, rate, ranks_per_node) for name, method in kinds.items()
        }
    links = 0 if ranks.is_alone else measurement_count(methods)
    link = None
    with screen.progress("measuring", links + len(kinds)) as advance:
        if not ranks.is_alone:
            link = measure_link(ranks.probe, methods, parameters, advance, ranks.on_nccl)
        messages = {} if link is None else link.as_link().cpu_s
        speeds = {}
        for name, method in kinds.items():
            advance(name)
            speeds[name] = measure_speed(
                *(ranks.probe, method, ranks.device, messages, ranks.cpu_weight),
                ranks_per_node=ranks_per_node,
            )
        return link, speeds


def _compute(
    args: argparse.Namespace, ranks: Ranks, workload: Workload | UserModel | None
) -> Compute | None:
    if args.compute_ms is not None:
        seconds = args.compute_ms / 1e3
        return Compute(seconds * FORWARD_SHARE, seconds * (1 - FORWARD_SHARE))
    if workload is None or args.copy_gbyte is not None:  # this machine is not one of the nodes
        return None
    return measure_compute(ranks.probe, workload, args.bucket_mb, ranks.device)
