"""Check this project on a machine with a GPU, in under 9 minutes, and write a report.

    make gpu-check                                       # or, without make, from the repository:
    PYTHONPATH=benchmarks python -m gpu_check --minutes 8.5
    PYTHONPATH=benchmarks python -m gpu_check --sections kernels bandwidth
    PYTHONPATH=benchmarks python -m gpu_check --device cpu    # tries the sections on the CPU

Torch with CUDA or ROCm and Triton are needed, and nothing else. Each section is a process with a time
limit, so that one that hangs or breaks the device does not end the others. The report consists of
report.json and report.md in build/gpu-check (``--out``), and is written again after each section.

Exit codes: 0, all checks passed or were skipped; 1, a check failed, or the check was interrupted;
2, usage; 3, there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

try:
    import torch  # noqa: F401
except ImportError as missing:
    print(
        f"{missing}: torch for this GPU is needed, and Triton. Is {sys.executable} the Python that has "
        "them? make gpu-check GPU_PYTHON=/path/to/python names another one.",
        file=sys.stderr,
    )
    sys.exit(2)

from gpu_check.machine import no_gpu  # noqa: E402
from gpu_check.outcome import FAILED, PASSED, SKIPPED, Checks, Context, Outcome  # noqa: E402
from gpu_check.processes import run_apart  # noqa: E402
from gpu_check.report import MANY, summary, write  # noqa: E402

NO_GPU = 3
STARTUP_S = 20.0


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        run: Module and function.
        share: Its share of the time.
        shares_cores: Whether several processes share the section.
    """

    run: str
    share: float
    shares_cores: bool = False


# In the order of what a short loan of a GPU is to show first.
SECTIONS = {
    "machine": Section("machine:run", 0.02),
    "kernels": Section("kernels:run", 0.18, shares_cores=True),
    "gloo": Section("ranks:run_gloo", 0.14),
    "step": Section("step:run", 0.08),
    "bandwidth": Section("bandwidth:run", 0.06),
    "nccl": Section("ranks:run_nccl", 0.08),
    "fsdp": Section("fsdp:run", 0.06),
    "text": Section("text:run", 0.3),
    "lightning": Section("lightning:run", 0.05),
    "graphs": Section("graphs:run", 0.03),
}


def run_here(name: str, context: Context) -> None:
    """Run one section in this process."""
    module, _, function = SECTIONS[name].run.partition(":")
    checks = Checks()
    imported: list[Any] = []
    if checks.run(f"section {name}", lambda: imported.append(import_module(f"gpu_check.{module}"))):
        run = getattr(imported[0], function)
        whole: list[Checks] = []
        if checks.run(f"section {name}", lambda: whole.append(run(context))):
            checks = whole[0]
    checks.write()


def environment_of(name: str, device: str) -> dict[str, str]:
    """Return the environment of a section's processes."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
    if device == "cpu" and name in ("kernels", "bandwidth"):
        found |= {"TRITON_INTERPRET": "1", "EFFADAM_KERNELS": "triton"}
    return found


def run_all(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run the sections one after the other, and write the report after each."""
    end_s = time.monotonic() + 60 * options.minutes
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        for at, name in enumerate(options.sections):
            shares = [SECTIONS[one].share for one in options.sections[at:]]
            remaining_s = end_s - time.monotonic() - STARTUP_S
            # A section may take half as long again, but all of them end in time.
            seconds = min(remaining_s * shares[0] / sum(shares), remaining_s / 1.5)
            print(f"{name}, about {max(0.0, seconds):.0f} s", flush=True)
            if seconds < 1:
                section = skipped(name, f"--minutes {options.minutes:g} are over")
            elif report["machine"].get("computes") is False:
                section = skipped(
                    name, "torch does not compute on this device, see section machine"
                )
            else:
                parts = min(8, cores // 2) if SECTIONS[name].shares_cores else 1
                command = [sys.executable, "-m", "gpu_check", "--section", name]
                command += ["--device", options.device, "--seconds", f"{seconds:.1f}"]
                section = run_apart(
                    name,
                    command,
                    environment_of(name, options.device),
                    1.5 * seconds + STARTUP_S,
                    Path(folder),
                    max(1, parts) if options.device == "cuda" else 1,
                )
            if name == "machine":
                report["machine"] |= section["facts"]
            report["sections"].append(section)
            print_section(section)
            report["seconds"] += section["seconds"]
            write(report, options.out)


def skipped(name: str, reason: str) -> dict[str, Any]:
    """Return a section that was not run."""
    outcome = Outcome(f"section {name}", SKIPPED, reason)
    return {"name": name, "seconds": 0.0, **asdict(Checks([outcome])), "output": ""}


def print_section(section: dict[str, Any]) -> None:
    outcomes = section["outcomes"]
    for one in outcomes:
        if one["status"] != PASSED or len(outcomes) <= MANY:
            detail = one["detail"] if one["status"] == FAILED else one["detail"].partition("\n")[0]
            print(f"  {one['status']:8}{one['name']}" + (f": {detail}" if detail else ""))
    for line in section["tables"]:
        print(f"  {line}")
    passed = sum(one["status"] == PASSED for one in outcomes)
    print(f"  {passed} of {len(outcomes)} passed, {section['seconds']:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description=__doc__.splitlines()[0],
        epilog=__doc__[__doc__.index("Exit codes") :].replace("\n", " "),
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all sections (8.5)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"Invalid --minutes: {options.minutes:g}. Must be positive.")
    options.sections = [name for name in SECTIONS if name in {"machine", *options.sections}]
    return options


def main() -> int:
    options = parse()
    if options.section is not None:
        context = Context(options.device, options.seconds, options.part, options.parts)
        run_here(options.section, context)
        return 0
    missing = no_gpu() if options.device == "cuda" else ""
    if missing:
        print(missing, file=sys.stderr)
        return NO_GPU
    report: dict[str, Any] = {
        "machine": {"vendor": "unknown", "device": "unknown", "count": 0},
        "command": " ".join(["python -m gpu_check", *sys.argv[1:]]),
        "seconds": 0.0,
        "ended": "",
        "sections": [],
    }
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run_all(options, report)
    except KeyboardInterrupt:
        done = [section["name"] for section in report["sections"]]
        report["ended"] = f"Interrupted; sections that have ended: {', '.join(done) or 'none'}."
        print(report["ended"], file=sys.stderr)
    path = write(report, options.out)
    print(f"{summary(report)}. Report: {path}")
    failed = any(one["status"] == FAILED for s in report["sections"] for one in s["outcomes"])
    return 1 if failed or report["ended"] else 0


if __name__ == "__main__":
    sys.exit(main())
