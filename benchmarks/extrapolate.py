"""Where does compression pay, and where not? The cost model from 64 to 1024 ranks, 1 to 400 Gbit/s.

    python benchmarks/extrapolate.py                  # writes docs/figures/extrapolation.png

Each field of the picture is the step time of a method over that of the dense all-reduce, both
predicted. Above .9 the method is not worth having; above 1 it loses. Nothing here was measured at
these sizes: read docs/cost-model.md on what the model leaves out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Cluster, Compute, Link, Speed, predict
from effadam_hook.planner.traffic import square_model

RANKS = (64, 128, 256, 512, 1024)
GBITS = (1, 2.5, 5, 10, 25, 50, 100, 200, 400)
METHODS = ("fp16", "lloyd4/sharded", "lloyd2/sharded", "lloyd4/rank0")
LEAST_GAIN = 0.9


@dataclass(frozen=True)
class Setting:
    """Assumptions, named in the picture.

    Attributes:
        name: What they are.
        numel: Parameters of the model.
        compute: A step without communication.
        copy_bytes_s: Memory bandwidth of one rank's device; kernels are multiples of it.
    """

    name: str
    numel: int
    compute: Compute
    copy_bytes_s: float

    def speed(self, bits: float) -> Speed:
        """Kernels that move each byte once: gradient, residuals and payload."""
        payload = bits / 8
        return Speed(
            encode_s=(12 + payload) / self.copy_bytes_s,
            reduce_s=(8 + payload) / self.copy_bytes_s,
            reduce_payload_s=payload / self.copy_bytes_s,
            decode_s=(4 + payload) / self.copy_bytes_s,
            call_s=20e-6,
        )


SETTINGS = (
    Setting("25 M parameters, 100 ms a step", 25_000_000, Compute(0.03, 0.06, 0.01), 2e12),
    Setting("350 M parameters, 250 ms a step", 350_000_000, Compute(0.08, 0.16, 0.01), 2e12),
    Setting("1.3 B parameters, 1 s a step", 1_300_000_000, Compute(0.33, 0.65, 0.02), 2e12),
)
LATENCY_S, MESSAGE_S = 1e-5, 2e-6
DRAWN = METHODS[:3]
BITS = {"fp16": 16.0, "lloyd4": 4.0, "lloyd2": 2.0}


def ratios(setting: Setting, name: str, bucket_mb: float) -> list[list[float]]:
    """Step time over dense, by ranks and bandwidth."""
    parameters = square_model(setting.numel, 4096)
    method = Method.parse(name).with_buckets(bucket_mb)
    dense = Method.parse("fp32").with_buckets(bucket_mb)
    speed = setting.speed(BITS[method.quantizer])
    rows = []
    for ranks in RANKS:
        row = []
        for gbit in GBITS:
            link = Link(gbit * 1e9 / 8, LATENCY_S, MESSAGE_S)
            # The device does one thing at a time: kernels slow backward, transfers do not.
            cluster = Cluster(ranks, link, cores=1.0, tree=True, in_order=True)
            ours = predict(method, parameters, cluster, speed, setting.compute)
            row.append(
                ours.step_s / predict(dense, parameters, cluster, None, setting.compute).step_s
            )
        rows.append(row)
    return rows


def draw(found: dict[tuple[str, str], list[list[float]]], path: Path) -> None:
    """A field for each setting, method, number of ranks and bandwidth."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vmin=0.0, vcenter=LEAST_GAIN, vmax=1.5)
    figure, axes = plt.subplots(
        len(SETTINGS),
        len(DRAWN),
        figsize=(4.0 * len(DRAWN), 2.3 * len(SETTINGS)),
        squeeze=False,
    )
    for axis, ((setting, method), rows) in zip(axes.flat, found.items(), strict=True):
        axis.imshow(rows, norm=norm, cmap="PiYG_r", aspect="auto")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
        axis.set_xticks(range(len(GBITS)), [f"{gbit:g}" for gbit in GBITS], fontsize=7)
        axis.set_yticks(range(len(RANKS)), [str(ranks) for ranks in RANKS], fontsize=7)
        axis.set_title(f"{method}: {setting}", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("Gbit/s of each rank", fontsize=7)
    for row in axes:
        row[0].set_ylabel("ranks", fontsize=7)
    figure.suptitle(
        "Predicted step time over that of dense fp32 all-reduce. "
        "Pink (above 0.9): compression does not pay.",
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def limits(found: dict[tuple[str, str], list[list[float]]]) -> str:
    """For every setting and method, from which bandwidth on it does not pay."""
    lines = [f"{'does not pay from, Gbit/s':<50}" + "".join(f"{n:>7}" for n in RANKS)]
    for (setting, method), rows in found.items():
        cells = []
        for row in rows:
            paying = [gbit for gbit, value in zip(GBITS, row, strict=True) if value <= LEAST_GAIN]
            over = [gbit for gbit in GBITS if not paying or gbit > max(paying)]
            cells.append(f"{over[0]:g}" if over else "never")
        lines.append(f"{setting + ', ' + method:<50}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=Path("docs/figures/extrapolation.png"))
    parser.add_argument("--bucket-mb", type=float, default=25.0)
    args = parser.parse_args()
    found = {
        (setting.name, method): ratios(setting, method, args.bucket_mb)
        for setting in SETTINGS
        for method in METHODS
    }
    print(limits(found))
    draw({key: rows for key, rows in found.items() if key[1] in DRAWN}, args.png)
    print(f"wrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
