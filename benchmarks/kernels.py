"""Time the three kernels against the reference, an addition and a copy.

    python benchmarks/kernels.py                       # CPU, 26 MB, one thread and all cores
    python benchmarks/kernels.py --device cuda         # GPU, 256 MB
    python benchmarks/kernels.py --csv kernels.csv --quantizers lloyd4 lloyd2

``torch.add(g, e, out=e)`` is the cost of error feedback without compression: it reads two tensors and
writes one. It alternates with the kernels, a few repeats at a time, so that ratios compare adjacent
measurements. "x add" is the ratio of the medians. "fastest" is the ratio of the fastest repeats, which
is more reliable on a machine with other load. On a GPU, calls are queued behind a kernel that spins, so
that launches cost nothing, and find a cache without their tensors; they alternate one by one. "floor"
is the bytes that a kernel must move divided by those of the addition: the ratio of a kernel limited by
memory alone. "faster" compares the fastest repeat with that of the reference. The kernels are first
checked against the reference; if the check fails, no figures are printed.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_check.device import device_of
from torch import Tensor

from effadam_hook.cli.environment import environment
from effadam_hook.kernels import Kernels, choose, reference
from effadam_hook.wire.layout import BucketLayout, Slot, lay_out_bucket
from effadam_hook.wire.quantizers import QUANTIZERS, get_quantizer

WORKERS = 4
PARAMETERS = 20
TURN = 5


@dataclass(frozen=True)
class Row:
    """One measurement, with times in milliseconds."""

    threads: int
    quantizer: str
    kernel: str
    backend: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    fastest_ms: float
    gigabytes_per_s: float
    times_add: float
    fastest_times_add: float
    floor_times_add: float
    times_faster: float | None


class Bucket:
    """Bucket of equal parameters with its payloads, and kernel calls without arguments."""

    def __init__(self, quantizer: str, numel: int, device: torch.device) -> None:
        self.layout = layout_of(quantizer, [numel // PARAMETERS] * PARAMETERS)
        numel = self.layout.numel
        self.g = torch.randn(numel, device=device)
        self.e = torch.zeros(numel, device=device)
        self.server_e = torch.zeros(numel, device=device)
        self.out = torch.empty(numel, device=device)
        self.sum = torch.randn(numel, device=device)
        stride = self.layout.uplink.stride_bytes
        self.sent = torch.zeros(1, stride, dtype=torch.uint8, device=device)
        self.reduced = torch.zeros(1, stride, dtype=torch.uint8, device=device)
        self.received = torch.zeros(WORKERS, stride, dtype=torch.uint8, device=device)
        for worker in range(WORKERS):
            x = torch.randn(numel, device=device)
            reference.encode_(self.layout.uplink, x, None, self.sent, torch.float32)
            self.received[worker] = self.sent[0]

    def add(self) -> None:
        """Run the addition of error feedback, the lower bound of encoding."""
        torch.add(self.g, self.sum, out=self.sum)

    def copy(self) -> None:
        """Run a copy, the lower bound of moving memory."""
        self.out.copy_(self.g)

    def calls(self, kernels: Kernels) -> dict[str, Callable[[], None]]:
        """Return calls of the three kernels, by name."""
        up, down = self.layout.uplink, self.layout.downlink

        def encode() -> None:
            kernels.encode_(up, self.g, self.e, self.sent, torch.float32)

        def reduce_encode() -> None:
            kernels.reduce_encode_(
                up, down, 0, self.received, self.server_e, torch.float32, self.reduced[0]
            )

        def decode() -> None:
            kernels.decode(down, self.received[:1], self.out, torch.float32)

        return {"encode_": encode, f"reduce_encode_ of {WORKERS}": reduce_encode, "decode": decode}

    def bytes_moved(self, kernel: str) -> int:
        """Return the bytes that a kernel must read and write; raw elements have no residual."""
        dense, payload = 4 * self.layout.numel, self.layout.uplink.payload_bytes
        residual = 0 if self.layout.uplink.quantizer.is_raw else 2 * dense
        fixed = {"add": 3 * dense, "copy": 2 * dense, "decode": dense + payload}
        fixed["encode_"] = dense + residual + payload
        return fixed.get(kernel, residual + (WORKERS + 1) * payload)


def layout_of(quantizer: str, sizes: list[int], exact: tuple[int, ...] = ()) -> BucketLayout:
    slots, start = [], 0
    for index, numel in enumerate(sizes):
        slots.append(Slot(f"p{index}", start, numel, index in exact))
        start += numel
    return lay_out_bucket(
        slots,
        uplink=get_quantizer(quantizer),
        downlink=get_quantizer(quantizer),
        scale_rule="least_squares",
        block_size=256,
        servers=1,
        itemsize=4,
    )


def check(kernels: Kernels, quantizers: list[str], device: torch.device) -> Iterator[str]:
    """Yield a description of each difference between the kernels and the reference."""
    for quantizer in quantizers:
        layout = layout_of(quantizer, [5000, 1, 777, 256], exact=(2,))
        x = torch.randn(layout.numel, device=device) * torch.rand(layout.numel, device=device) ** 4
        residuals = [torch.zeros_like(x), torch.zeros_like(x)]
        shape = (1, layout.uplink.stride_bytes)
        payloads = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in residuals]
        for which, e, payload in zip((reference, kernels), residuals, payloads, strict=True):
            which.encode_(layout.uplink, x, e, payload, torch.float32)
        decoded: list[Tensor] = []
        for which, payload in ((reference, 0), (kernels, 0), (kernels, 1)):
            out = torch.full_like(x, float("nan"))
            which.decode(layout.uplink, payloads[payload], out, torch.float32)
            decoded.append(out)
        if not torch.equal(decoded[0], decoded[1]):
            yield f"{quantizer}: decodes the payload of the reference to other values"
        far = (decoded[2] - decoded[0]).abs() > 2.0**-7 * decoded[0].abs()
        if far.double().mean() > 0.01:
            yield f"{quantizer}: encodes {int(far.sum())} of {len(x)} elements differently"
        quantized = torch.ones_like(x, dtype=torch.bool)
        quantized[5001:5778] = False
        if quantizer != "none" and (decoded[2] + residuals[1] - x)[quantized].abs().max() > 1e-5:
            yield f"{quantizer}: decoded payload and residual do not add up to the input"
        reduced: list[Tensor] = []
        for which in (reference, kernels):
            up, down, e, payload = layout.uplink, layout.downlink, x * 0.1, payloads[1].clone()
            which.reduce_encode_(up, down, 0, torch.cat(payloads), e, torch.float32, payload[0])
            reduced.append(torch.empty_like(x))
            reference.decode(down, payload, reduced[-1], torch.float32)
        far = (reduced[1] - reduced[0]).abs() > 2.0**-7 * reduced[0].abs()
        if far.double().mean() > 0.01:
            yield f"{quantizer}: reduces {int(far.sum())} of {len(x)} elements differently"


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Measure the seconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def measure(
    calls: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure the seconds of each repeat of each call; the first call of a turn warms the caches."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    while any(len(one) < repeats for one in times.values()):
        for name, call in calls.items():
            timed(call, device)
            times[name] += [timed(call, device) for _ in range(min(TURN, repeats))]
    return times


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def rows_of(
    bucket: Bucket, quantizer: str, kernels: Kernels, threads: int, options: argparse.Namespace
) -> Iterator[Row]:
    device = bucket.g.device
    reference_times: dict[str, list[float]] = {}
    if not options.no_reference:
        reference_times = measure(bucket.calls(reference), 1, device)
    bucket.e.zero_()
    bucket.server_e.zero_()
    calls = {"add": bucket.add, "copy": bucket.copy, **bucket.calls(kernels)}
    if device.type == "cuda":
        kernel_times = device_of("cuda").seconds_of(calls, options.repeats)
    else:
        kernel_times = measure(calls, options.repeats, device)
    add = kernel_times["add"]

    def row(name: str, backend: str, times: list[float]) -> Row:
        median, moved = statistics.median(times), bucket.bytes_moved(name)
        compared = name in reference_times and backend != reference.name
        return Row(
            threads,
            quantizer,
            name,
            backend,
            1e3 * median,
            1e3 * percentile(times, 0.2),
            1e3 * percentile(times, 0.8),
            1e3 * min(times),
            moved / median / 1e9,
            median / statistics.median(add),
            min(times) / min(add),
            moved / bucket.bytes_moved("add"),
            min(reference_times[name]) / min(times) if compared else None,
        )

    for name, times in reference_times.items():
        yield row(name, reference.name, times)
    for name, times in kernel_times.items():
        yield row(name, "torch" if name in ("add", "copy") else kernels.name, times)


HEADER = (
    f"{'threads':>7} {'quantizer':9} {'kernel':19} {'backend':9} {'median ms':>9} {'p20':>8} "
    f"{'p80':>8} {'fastest':>8} {'GB/s':>7} {'x add':>6} {'fastest':>7} {'floor':>5} "
    f"{'faster':>7}"
)


def format_row(row: Row) -> str:
    faster = "" if row.times_faster is None else f"{row.times_faster:.1f}x"
    return (
        f"{row.threads:7} {row.quantizer:9} {row.kernel:19} {row.backend:9} {row.median_ms:9.3f} "
        f"{row.p20_ms:8.3f} {row.p80_ms:8.3f} {row.fastest_ms:8.3f} {row.gigabytes_per_s:7.1f} "
        f"{row.times_add:6.2f} {row.fastest_times_add:7.2f} {row.floor_times_add:5.2f} "
        f"{faster:>7}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--megabytes", type=int, help="size of the bucket (CPU 26, GPU 256)")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="threads, CPU only (1 and all cores)"
    )
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--no-reference", action="store_true", help="omit the slow rows")
    parser.add_argument("--csv", type=Path, help="write the rows to this file as well")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device, so there is nothing to measure.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    selected = choose(device)
    for key, value in environment().items():
        print(f"# {key}: {value}")
    if device.type == "cuda":
        print(f"# device: {torch.cuda.get_device_name()}")
    print(f"# kernels: {selected.reason}")

    differences = list(check(selected.kernels, options.quantizers, device))
    if differences:
        print("\n".join(f"FAILED {one}" for one in differences), file=sys.stderr)
        print("The check failed, so there are no figures.", file=sys.stderr)
        return 1
    print(f"# checked against the reference: {len(options.quantizers)} quantizers")

    default = 26 if device.type == "cpu" else 256
    numel = (options.megabytes or default) * 1_000_000 // 4
    counts = options.threads or sorted({1, os.cpu_count() or 1})
    rows: list[Row] = []
    print(HEADER)
    for threads in counts if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        for quantizer in options.quantizers:
            bucket = Bucket(quantizer, numel, device)
            for row in rows_of(bucket, quantizer, selected.kernels, threads, options):
                rows.append(row)
                print(format_row(row), flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(vars(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
