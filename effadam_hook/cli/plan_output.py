"""Output of ``effadam plan``: the measurements, the predictions, and the conclusion."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from effadam_hook.cli.ranks import Ranks
from effadam_hook.cli.ui import Screen
from effadam_hook.kernels import choose
from effadam_hook.planner.advice import Advice, bits_of, break_even_s, code_for, dense_for
from effadam_hook.planner.measure_link import MeasuredLink
from effadam_hook.planner.predict import Cluster, Compute, Prediction, Speed
from effadam_hook.planner.quality import describe_quality
from effadam_hook.planner.traffic import ParameterSize

__all__ = ["Plan", "conclusion_of", "result_of", "show"]


@dataclass(frozen=True)
class Plan:
    """Everything that the command has measured and predicted.

    Attributes:
        ranks: The ranks that measured.
        cluster: The cluster of the predictions.
        link: The measured link; None if the cluster was described by arguments.
        speeds: Durations of the arithmetic of each method.
        compute: Durations of a step without communication; None if they are unknown.
        parameters: Sizes of the trained parameters.
        predictions: Predictions for the methods.
        dense: Predictions for the dense all-reduce, one for every bucket size.
        advice: The recommendation; without a compute time, the one for an exchange alone.
        load: Load of rank 0's machine before the measurement, if higher than its number of cores.
        copy_gbyte: GB/s that a GPU of the described nodes copies, from which the arithmetic was
            calculated; None if it was measured.
    """

    ranks: Ranks
    cluster: Cluster
    link: MeasuredLink | None
    speeds: dict[str, Speed]
    compute: Compute | None
    parameters: list[ParameterSize]
    predictions: list[Prediction]
    dense: list[Prediction]
    advice: Advice
    load: float | None = None
    copy_gbyte: float | None = None

    @property
    def kernels(self) -> str:
        """Return which kernels the predictions assume."""
        if self.copy_gbyte is None:
            return choose(self.ranks.device).reason
        return f"of a GPU that copies {self.copy_gbyte:g} GB/s, calculated; NCCL"

    @property
    def knows_compute(self) -> bool:
        """Return whether the compute time of a step is known."""
        return self.compute is not None

    @property
    def is_decided(self) -> bool:
        """Return whether a recommendation follows from what is known."""
        return self.knows_compute or not self.advice.pays


def conclusion_of(plan: Plan) -> list[str]:
    """Return the recommendation, what it does not know, its cost in quality, and what to do next."""
    best = plan.advice.best
    name = _name(best, plan.cluster)
    lines = []
    if plan.ranks.is_local:
        lines.append(
            f"All {plan.cluster.world_size} ranks are on one machine: this measured its loopback "
            "interface, not a network. The predictions hold for training on this machine alone. For "
            "several machines start the command on each of them, or describe them with --nodes, "
            "--ranks-per-node and --gbit."
        )
    if plan.link is None:
        inside = "" if plan.cluster.inside else ", and nothing limits the ranks inside a node"
        lines.append(
            "The links are described, not measured: no collective is slower than its link here, and "
            f"every rank has a core of its own{inside}. Start the command under a launcher on the "
            "nodes to measure them."
        )
    if plan.copy_gbyte is not None:
        lines.append(
            "Kernels are calculated, not measured: each moves every byte once. That is a lower bound "
            "for their time, and for that of PowerSGD's small matrices."
        )
    elif plan.link is None and plan.ranks.device.type == "cpu":
        lines.append(
            "The kernels are those of this machine's CPU. For nodes with GPUs add --copy-gbyte with "
            "the GB/s that one of them copies, for example 2000."
        )
    if plan.load is not None and plan.ranks.device.type == "cpu":
        lines.append(
            f"This machine was busy before the measurement: a load of {plan.load:.1f} on "
            f"{os.cpu_count()} cores. The kernels, and a measured computation, are taken as slow as "
            "they were here, which can change the recommendation. Repeat on idle machines."
        )
    if not plan.advice.pays and not plan.knows_compute:
        lines.append(
            f"Compression does not pay here, whatever the compute time: no method that can be "
            f"recommended makes the exchange 10% shorter than the {1e3 * best.exchange_s:.1f} ms of "
            "dense. Keep DDP's own all-reduce."
        )
    elif not plan.is_decided:
        limit_s = break_even_s(plan.advice, plan.dense, plan.parameters, plan.cluster, plan.speeds)
        dense_s = min(one.exchange_s for one in plan.dense)
        measure = ", or --model to measure it" if plan.copy_gbyte is None else ""
        lines += [
            f"No recommendation: the compute time of a step is unknown. An exchange takes "
            f"{1e3 * dense_s:.1f} ms dense and {1e3 * best.exchange_s:.1f} ms "
            f"with {name}. That makes a step 10% shorter if a step computes for less than about "
            f"{_round(1e3 * limit_s)} ms; a longer one hides the dense exchange.",
            "Next: add --compute-ms with the time of your step on one rank without communication"
            f"{measure}.",
        ]
    else:
        lines.append(plan.advice.reason)
    if plan.advice.pays and plan.knows_compute:
        where = "on these ranks" if plan.link else "on the nodes, under a launcher"
        lines += [
            " ".join([describe_quality(best.method), *_gentler(plan)]),
            f"Next: train with the lines below, or first compare {where}: effadam bench "
            f'--methods "{_with_dense(best)}" --model MODULE:FUNCTION.',
        ]
    return lines


def _with_dense(prediction: Prediction) -> str:
    """Return the names of dense and a method, with the method's buckets."""
    method = prediction.method
    name = method.name.partition("@")[0]
    buckets = "" if method.bucket_mb is None else f"@{method.bucket_mb:g}"
    return f"fp32{buckets},{name}{buckets}"


def _gentler(plan: Plan) -> list[str]:
    """Return what the fastest method of four or more bits would take, if fewer are recommended."""
    fine = [p for p in plan.predictions if p.method.kind == "gradient" and bits_of(p.method) >= 4]
    gentler = min(fine, key=lambda p: p.step_s, default=plan.advice.best)
    if bits_of(plan.advice.best.method) >= 4 or gentler is plan.advice.best:
        return []
    return [f"{_name(gentler, plan.cluster)} takes {1e3 * gentler.step_s:.1f} ms."]


def _round(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _name(prediction: Prediction, cluster: Cluster) -> str:
    """Return the name of a method, with the topology that a name without one means here."""
    method = prediction.method
    if not method.is_effadam or ("/" in method.name and "/auto" not in method.name):
        return method.name.replace("fp32", "off (fp32)")
    rest, at, cap = method.name.partition("@")
    return f"{rest.partition('/')[0]}/{method.topology}{at}{cap}"


def show(screen: Screen, plan: Plan) -> None:
    """Print the measurements, the predictions and the conclusion."""
    _show_link(screen, plan)
    if plan.compute is None:
        screen.note("The compute time is unknown: a step below is the exchange alone.")
    else:
        compute = plan.compute
        parts = [1e3 * part for part in (compute.forward_s, compute.backward_s, compute.rest_s)]
        screen.note(
            f"compute: forward {parts[0]:.1f} ms, backward {parts[1]:.1f} ms, rest {parts[2]:.1f} ms"
        )
    best = plan.advice.best
    screen.table(
        "predicted",
        ("method", "step ms", "x fp32", "exchange ms", "waits ms", "wire floor ms", "MB"),
        [
            (
                _name(p, plan.cluster),
                f"{1e3 * p.step_s:.1f}",
                f"{p.step_s / dense_for(p.method, plan.dense).step_s:.3f}",
                f"{1e3 * p.exchange_s:.1f}",
                f"{1e3 * p.exposed_s:.1f}",
                f"{1e3 * p.floor_s:.1f}",
                f"{p.busiest_bytes / 1e6:.2f}",
            )
            for p in plan.predictions
        ],
        marked=next(
            (i for i, p in enumerate(plan.predictions) if p is best and plan.is_decided), None
        ),
    )
    for line in conclusion_of(plan):
        screen.note(line)
    if plan.is_decided:
        screen.code(code_for(best.method))


def _show_link(screen: Screen, plan: Plan) -> None:
    ranks, link, cluster = plan.ranks, plan.link, plan.cluster
    kernels = plan.kernels
    shape = f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks"
    if link is None:
        bits = cluster.link.bandwidth_bytes_s * 8e-9
        screen.note(f"{shape} with a card of {bits:g} Gbit/s each, as described; kernels {kernels}")
        return
    shape = f"{shape}, " if cluster.ranks_per_node > 1 else ""
    screen.note(
        f"{cluster.world_size} ranks over {ranks.backend}, {shape}{ranks.neighbours} on this machine, "
        f"{ranks.device.type}; kernels {kernels}"
    )
    through = "loopback" if ranks.is_local else "link"
    of_node = " of a node" if cluster.ranks_per_node > 1 else ""
    screen.note(
        f"{through}{of_node}: {link.payload_bytes_s * 8e-9:.3f} Gbit/s of payload in both directions "
        f"at once, {1e3 * link.latency_s:.3f} ms per message"
    )
    if link.inside_bytes_s is not None:
        screen.note(
            f"inside a node: {link.inside_bytes_s * 8e-9:.3f} Gbit/s for every rank at once, "
            f"{1e3 * link.inside_latency_s:.3f} ms per message"
        )
    screen.table(
        "collectives",
        ("", "MB on the busiest card", "MB inside", "ms", "ms if empty", "x the links alone"),
        [
            (
                leg.name,
                f"{leg.busiest_bytes / 1e6:.3f}",
                f"{leg.inside_bytes / 1e6:.3f}",
                f"{1e3 * leg.seconds:.2f}",
                f"{1e3 * leg.overhead_s:.2f}",
                f"{leg.slowdown:.2f}",
            )
            for leg in link.legs
        ],
    )


def result_of(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; nothing is recommended where a compute time is missing."""
    ranks, cluster, best = plan.ranks, plan.cluster, plan.advice.best
    return {
        "world_size": cluster.world_size,
        "nodes": cluster.nodes,
        "ranks_per_node": cluster.ranks_per_node,
        "on_one_machine": ranks.is_local,
        "ranks_on_this_machine": ranks.neighbours,
        "cores_per_rank": ranks.cores,
        "backend": ranks.backend if plan.copy_gbyte is None else "nccl",
        "device": ranks.device.type if plan.copy_gbyte is None else "cuda",
        "kernels": plan.kernels,
        "parameters": sum(p.numel for p in plan.parameters),
        "link": None if plan.link is None else plan.link.to_dict(),
        "speeds": {name: vars(speed) for name, speed in plan.speeds.items()},
        "compute": vars(plan.compute or Compute()),
        "predictions": [_as_dict(p) for p in plan.predictions],
        "recommended": {
            "method": best.method.name if plan.is_decided else None,
            "compression_pays": plan.advice.pays if plan.is_decided else None,
            "reason": plan.advice.reason if plan.knows_compute else "",
            "code": code_for(best.method) if plan.is_decided else "",
        },
        "conclusion": conclusion_of(plan),
        "dense": [_as_dict(p) for p in plan.dense],
    }


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    method = prediction.method
    return {
        **vars(prediction),
        "method": method.name,
        "topology": method.topology if method.is_effadam else "",
        "bucket_mb": method.bucket_mb,
    }
