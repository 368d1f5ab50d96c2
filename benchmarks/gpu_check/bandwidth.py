"""Time the kernels against a copy on the device."""

from __future__ import annotations

import statistics

from kernels import Bucket

from effadam_hook.kernels import Kernels, choose
from gpu_check.device import Device, device_of
from gpu_check.outcome import Checks, Context, SkipError

__all__ = ["run"]

MEGABYTES = (16.0, 64.0, 256.0)
QUANTIZERS = ("lloyd4", "lloyd2", "uniform8")
REPEATS = 20


def run(context: Context) -> Checks:
    """Make a table of bandwidths, as a share of that of a copy in the same run."""
    device = device_of(context.device)
    kernels = choose(device.device).kernels
    checks = Checks(
        tables=[
            "| MB | quantizer | kernel | ms | GB/s | share of a copy |",
            "|---|---|---|---|---|---|",
        ]
    )
    sizes, names = (MEGABYTES, QUANTIZERS) if device.is_gpu else ((0.02,), QUANTIZERS[:1])

    def measured(megabytes: float, quantizer: str) -> str:
        if context.left_s < 0:
            raise SkipError("the time of the section is over")
        rows, summary = table_of(device, kernels, megabytes, quantizer)
        checks.tables += rows
        return summary

    for megabytes in sizes:
        for quantizer in names:
            checks.run(
                f"{quantizer}, {megabytes:g} MB",
                lambda m=megabytes, q=quantizer: measured(m, q),
            )
    return checks


def table_of(
    device: Device, kernels: Kernels, megabytes: float, quantizer: str
) -> tuple[list[str], str]:
    """Measure a bucket; return the rows of the table and a summary."""
    if kernels.name != "triton":
        raise SkipError(f"the kernels are {kernels.name!r}, see section machine")
    bucket = Bucket(quantizer, int(megabytes * 1e6) // 4, device.device)
    calls = {"copy": bucket.copy, **bucket.calls(kernels)}
    times = device.seconds_of(calls, REPEATS if device.is_gpu else 1)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    copied = bucket.bytes_moved("copy") / medians["copy"]
    rows, shares = [], []
    for name, median in medians.items():
        speed = bucket.bytes_moved(name) / median
        rows.append(
            f"| {megabytes:g} | {quantizer} | {name} | {1e3 * median:.3f} | {speed / 1e9:.0f} | "
            f"{speed / copied:.2f} |"
        )
        if name != "copy":
            shares.append(f"{name} {speed / copied:.2f}")
    return rows, f"copy {copied / 1e9:.0f} GB/s, of which {', '.join(shares)}"
