"""Figure, table and status line of README.md: step times by link, and what has run on GPUs.

    python benchmarks/readme.py    # rewrites docs/images/step_time.svg, and README.md between markers

The figure shows the tables of docs/benchmarks.md, which were measured. The table is a prediction of the
cost model, with what benchmarks/extrapolate.py assumes of a GPU: no GPU was measured. The status line
is that of the newest report of ``make gpu-check`` in docs/gpu, or says that there is none.
"""

from __future__ import annotations

import argparse
import re
import sys
from html import escape
from pathlib import Path

from extrapolate import INSIDE, LATENCY_S, MESSAGE_S, SETTINGS
from gpu_check.report import status_line

from effadam_hook.planner.cluster import Cluster, Link
from effadam_hook.planner.copying import copying_speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import predict
from effadam_hook.planner.traffic import square_model

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
FIGURE = ROOT / "docs" / "images" / "step_time.svg"
BEGIN, END = "<!-- steps:begin -->", "<!-- steps:end -->"
GPU_REPORTS = ROOT / "docs" / "gpu"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
LINKS = ("200 Mbit/s", "1 Gbit/s", "2.5 Gbit/s", "10 Gbit/s")
BARS = (
    ("fp32", "dense", "#8a94a6"),
    ("lloyd4/sharded", "4 bits", "#0b7a75"),
    ("none", "no communication", "#d5dae2"),
)

NODES = 8
RANKS_PER_NODE = (1, 4, 8)
GBITS = (1, 10, 25, 50, 100, 200)
MODEL = SETTINGS[1]
BUCKET_MB = 25.0
MIN_GAIN = 0.1


def cells(line: str) -> list[str]:
    """Return the cells of a line of a table, without emphasis."""
    return [re.sub(r"[`*]", "", cell).strip() for cell in line.strip().strip("|").split("|")]


def measured_ms(document: str, link: str) -> dict[str, float]:
    """Read the step times of a link from the table that has a column for it.

    Args:
        document: Text of docs/benchmarks.md.
        link: Name of the link, such as ``"1 Gbit/s"``.

    Returns:
        Milliseconds by method.
    """
    lines = document.splitlines()
    column = f"{link}, ms"
    at = next(i for i, line in enumerate(lines) if line.startswith("|") and column in cells(line))
    index = cells(lines[at]).index(column)
    times = {}
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        row = cells(line)
        times[row[0].partition(":")[0] if row[0].startswith("none") else row[0]] = float(row[index])
    return times


def draw(document: str) -> str:
    """Draw the measured step times as SVG, each link relative to its dense step."""
    left, width, bar, gap = 104, 330, 19, 16
    full = 510
    parts = []
    y = 54.0
    for link in LINKS:
        times = measured_ms(document, link)
        parts.append(
            f'<text x="{left - 10}" y="{y + 2 * bar - 3}" text-anchor="end" class="link">{link}</text>'
        )
        for method, _, colour in BARS:
            length = width * times[method] / times["fp32"]
            label = f"{times[method]:g} ms"
            if method == "lloyd4/sharded":
                label += f", {times['fp32'] / times[method]:.1f}× faster"
            parts.append(
                f'<rect x="{left}" y="{y:g}" width="{length:.1f}" height="{bar - 2}" fill="{colour}"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + 13:g}">{escape(label)}</text>'
            )
            y += bar
        y += gap
    legend, x = [], left
    for _, name, colour in BARS:
        legend.append(
            f'<rect x="{x}" y="24" width="12" height="12" fill="{colour}"/>'
            f'<text x="{x + 17}" y="34">{name}</text>'
        )
        x += 17 + 8 * len(name) + 24
    return "\n".join(
        (
            '<svg xmlns="http://www.w3.org/2000/svg"',
            f'  viewBox="0 0 {full} {y:g}" width="{full}" height="{y:g}"',
            '  role="img" aria-label="Step time, dense and with 4 bits, by link">',
            "<style>text{font:14px sans-serif;fill:#1f2733}.link{font-weight:bold}</style>",
            f'<rect width="{full}" height="{y:g}" fill="#fff"/>',
            *legend,
            *parts,
            "</svg>\n",
        )
    )


def step_s(name: str, ranks_per_node: int, gbit: float) -> float:
    """Predict the time of a step on nodes whose ranks share a card of ``gbit`` Gbit/s."""
    method = Method.parse(name).with_buckets(BUCKET_MB)
    # As in benchmarks/extrapolate.py: with one core, kernels slow down backward.
    cluster = Cluster(
        NODES * ranks_per_node,
        Link(gbit * 1e9 / 8, LATENCY_S, MESSAGE_S),
        cores=1.0,
        on_nccl=True,
        ranks_per_node=ranks_per_node,
        inside=INSIDE if ranks_per_node > 1 else None,
    )
    speed = copying_speed(method, MODEL.copy_bytes_s, ranks_per_node)
    parameters = square_model(MODEL.numel, 4096)
    return predict(method, parameters, cluster, speed, MODEL.compute).step_s


def table() -> str:
    """Format the predictions as the table of README.md."""
    lines = [
        "| card of a node | " + " | ".join(f"{n} ranks a node" for n in RANKS_PER_NODE) + " |",
        "|---:|" + "---|" * len(RANKS_PER_NODE),
    ]
    for gbit in GBITS:
        row = [f"{gbit} Gbit/s"]
        for ranks in RANKS_PER_NODE:
            ours = "lloyd4/hierarchical" if ranks > 1 else "lloyd4/sharded"
            dense_s, ours_s = step_s("fp32", ranks, gbit), step_s(ours, ranks, gbit)
            pays = ours_s <= (1 - MIN_GAIN) * dense_s
            row.append(
                f"{dense_s:.2f} s → **{ours_s:.2f} s**" if pays else f"{dense_s:.2f} s, stay dense"
            )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines).replace("1 ranks a node", "1 rank a node")


def with_table(text: str) -> str:
    """Return the text of README.md with the table between its markers renewed."""
    return between(text, BEGIN, f"\n\n{table()}\n\n", END)


def with_status(text: str) -> str:
    """Return the text of README.md with what has run on GPUs between its markers."""
    return between(text, GPU_BEGIN, status_line(GPU_REPORTS), GPU_END)


def between(text: str, begin: str, new: str, end: str) -> str:
    """Replace what stands between two markers."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"README.md lacks {begin} or {end}, between which generated text belongs.")
    return f"{before}{begin}{new}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    README.write_text(with_status(with_table(README.read_text("utf-8"))), "utf-8")
    print(table())
    FIGURE.write_text(draw(MEASURED.read_text("utf-8")), "utf-8")
    print(f"wrote {FIGURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
