"""Time the kernels against a copy on the device."""

from __future__ import annotations

import time

import torch
from kernels import Bucket, measure

from effadam_hook.kernels import choose
from gpu_check.outcome import Checks, Context, SkipError

__all__ = ["run"]

MEGABYTES = (16, 64, 256)
QUANTIZERS = ("lloyd4", "lloyd2", "uniform8")


def run(context: Context) -> Checks:
    """Make a table of bandwidths, as a share of that of a copy in the same run."""
    checks = Checks()
    device = torch.device(context.device)
    kernels = choose(device).kernels
    end_s = time.monotonic() + context.seconds
    checks.tables = [
        "| MB | quantizer | kernel | ms | GB/s | share of a copy |",
        "|---|---|---|---|---|---|",
    ]

    def table_of(megabytes: int, quantizer: str) -> str:
        if time.monotonic() > end_s:
            raise SkipError("the time of the section is over")
        bucket = Bucket(quantizer, megabytes * 1_000_000 // 4, device)
        times = measure({"copy": bucket.copy, **bucket.calls(kernels)}, 20, device)
        copied = bucket.bytes_moved("copy") / sorted(times["copy"])[10]
        for name, taken in times.items():
            median = sorted(taken)[10]
            speed = bucket.bytes_moved(name) / median
            checks.tables.append(
                f"| {megabytes} | {quantizer} | {name} | {1e3 * median:.3f} | {speed / 1e9:.0f} | "
                f"{speed / copied:.2f} |"
            )
        return f"copy {copied / 1e9:.0f} GB/s"

    sizes = MEGABYTES if device.type == "cuda" else (1,)
    for megabytes in sizes:
        for quantizer in QUANTIZERS if device.type == "cuda" else QUANTIZERS[:1]:
            checks.run(
                f"{quantizer}, {megabytes} MB", lambda m=megabytes, q=quantizer: table_of(m, q)
            )
    return checks
