"""Predict where compression pays: 2 to 128 nodes of several ranks, with cards of 1 to 400 Gbit/s.

    python benchmarks/extrapolate.py                  # writes docs/figures/extrapolation.png
    python benchmarks/extrapolate.py --ranks-per-node 1 --png /tmp/one_rank_a_node.png

Each field of the figure is the predicted step time of a method divided by that of the dense
all-reduce. Above 0.9 the method is not worth using; above 1 it is slower than dense. No measurement
exists at these sizes. docs/cost-model.md lists what the model does not include.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from effadam_hook.planner.copying import copying_speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Compute, Link, predict
from effadam_hook.planner.traffic import square_model

NODES = (2, 4, 8, 32, 128)
GBITS = (1, 2.5, 5, 10, 25, 50, 100, 200, 400)
METHODS = ("fp16", "lloyd4/hierarchical", "lloyd2/hierarchical", "lloyd4/sharded", "lloyd4/rank0")
MAX_RATIO = 0.9


@dataclass(frozen=True)
class Setting:
    """Assumptions of one row of the figure.

    Attributes:
        name: Description, as shown in the figure.
        numel: Number of parameters of the model.
        compute: Durations of a step without communication.
        copy_bytes_s: Memory bandwidth of a rank's device, from which kernel times are computed.
    """

    name: str
    numel: int
    compute: Compute
    copy_bytes_s: float


SETTINGS = (
    Setting("25 M parameters, 100 ms a step", 25_000_000, Compute(0.03, 0.06, 0.01), 2e12),
    Setting("350 M parameters, 250 ms a step", 350_000_000, Compute(0.08, 0.16, 0.01), 2e12),
    Setting("1.3 B parameters, 1 s a step", 1_300_000_000, Compute(0.33, 0.65, 0.02), 2e12),
)
LATENCY_S, MESSAGE_S = 1e-5, 2e-6
INSIDE = Link(100e9, latency_s=5e-6, message_s=1e-6, efficiency=1.0)
DRAWN = METHODS[:3]


def ratios(setting: Setting, name: str, bucket_mb: float, per_node: int) -> list[list[float]]:
    """Predict the step time relative to dense, by number of nodes and bandwidth of their cards."""
    parameters = square_model(setting.numel, 4096)
    method = Method.parse(name).with_buckets(bucket_mb)
    dense = Method.parse("fp32").with_buckets(bucket_mb)
    speed = copying_speed(method, setting.copy_bytes_s, per_node)
    inside = INSIDE if per_node > 1 else None
    rows = []
    for nodes in NODES:
        row = []
        for gbit in GBITS:
            link = Link(gbit * 1e9 / 8, LATENCY_S, MESSAGE_S)
            # With one core, kernels slow down backward; transfers do not.
            cluster = Cluster(nodes * per_node, link, 1.0, True, True, per_node, inside)
            step_s = predict(method, parameters, cluster, speed, setting.compute).step_s
            row.append(step_s / predict(dense, parameters, cluster, None, setting.compute).step_s)
        rows.append(row)
    return rows


def draw(results: dict[tuple[str, str], list[list[float]]], path: Path, per_node: int) -> None:
    """Draw a field for each setting, method, number of nodes and bandwidth."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vmin=0.0, vcenter=MAX_RATIO, vmax=1.5)
    figure, axes = plt.subplots(
        len(SETTINGS),
        len(DRAWN),
        figsize=(4.0 * len(DRAWN), 2.3 * len(SETTINGS)),
        squeeze=False,
    )
    for axis, ((setting, method), rows) in zip(axes.flat, results.items(), strict=True):
        axis.imshow(rows, norm=norm, cmap="PiYG_r", aspect="auto")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
        axis.set_xticks(range(len(GBITS)), [f"{gbit:g}" for gbit in GBITS], fontsize=7)
        axis.set_yticks(range(len(NODES)), [str(nodes) for nodes in NODES], fontsize=7)
        axis.set_title(f"{method}: {setting}", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("Gbit/s of a node's card", fontsize=7)
    for row in axes:
        row[0].set_ylabel(f"nodes of {per_node} rank{'s' * (per_node > 1)}", fontsize=7)
    figure.suptitle(
        "Predicted step time over that of dense fp32 all-reduce. "
        "Pink (above 0.9): compression does not pay.",
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def limits(results: dict[tuple[str, str], list[list[float]]]) -> str:
    """Format the bandwidths from which each method does not pay, for every setting."""
    lines = [
        f"{'does not pay from, Gbit/s a node; nodes:':<52}" + "".join(f"{n:>7}" for n in NODES)
    ]
    for (setting, method), rows in results.items():
        cells = []
        for row in rows:
            paying = [gbit for gbit, value in zip(GBITS, row, strict=True) if value <= MAX_RATIO]
            over = [gbit for gbit in GBITS if not paying or gbit > max(paying)]
            cells.append(f"{over[0]:g}" if over else "never")
        lines.append(f"{setting + ', ' + method:<52}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=Path("docs/figures/extrapolation.png"))
    parser.add_argument("--bucket-mb", type=float, default=25.0)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    args = parser.parse_args()
    results = {
        (setting.name, method): ratios(setting, method, args.bucket_mb, args.ranks_per_node)
        for setting in SETTINGS
        for method in METHODS
    }
    print(limits(results))
    drawn = {key: rows for key, rows in results.items() if key[1] in DRAWN}
    draw(drawn, args.png, args.ranks_per_node)
    print(f"wrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
