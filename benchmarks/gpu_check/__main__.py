"""Check this project on a machine with a GPU, in under 9 minutes, and write a report.

    make gpu-check                                       # or, without make, from the repository:
    PYTHONPATH=benchmarks python -m gpu_check --minutes 8.5
    PYTHONPATH=benchmarks python -m gpu_check --sections kernels bandwidth
    PYTHONPATH=benchmarks python -m gpu_check --device cpu --minutes 2    # tries the sections

Torch with CUDA or ROCm and Triton are needed, and nothing else. Each section is a process with a time
limit, so that one that hangs or breaks the device does not end the others. The report consists of
report.json and report.md in build/gpu-check (``--out``).

Exit codes: 0, all checks passed or were skipped; 1, a check failed; 2, usage; 3, there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import torch  # noqa: E402

from gpu_check.outcome import (  # noqa: E402
    FAILED,
    OUTCOMES_VARIABLE,
    PASSED,
    SKIPPED,
    Checks,
    Context,
    Outcome,
)
from gpu_check.report import describe_machine, markdown  # noqa: E402

NO_GPU = 3
RESERVE_S = 10.0


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        run: Module and function.
        share: Its share of the time.
    """

    run: str
    share: float


# In the order of what a short loan of a GPU is to show first.
SECTIONS = {
    "kernels": Section("kernels:run", 0.22),
    "bandwidth": Section("bandwidth:run", 0.08),
    "step": Section("step:run", 0.12),
    "gloo": Section("ranks:run_gloo", 0.15),
    "nccl": Section("ranks:run_nccl", 0.1),
    "text": Section("text:run", 0.25),
    "lightning": Section("lightning:run", 0.08),
}


def load(section: Section) -> Callable[[Context], Checks]:
    module, _, function = section.run.partition(":")
    found: Callable[[Context], Checks] = getattr(import_module(f"gpu_check.{module}"), function)
    return found


def run_here(name: str, device: str, seconds: float) -> None:
    """Run one section in this process."""
    checks = Checks()
    try:
        checks = load(SECTIONS[name])(Context(device, seconds))
    except Exception as error:
        checks.outcomes.append(
            Outcome(f"section {name}", FAILED, f"{type(error).__name__}: {error}")
        )
    checks.write()


def run_apart(name: str, device: str, seconds: float) -> dict[str, Any]:
    """Run one section in a process of its own, which is killed when its time is over."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
    if device == "cpu":  # the kernels of the GPU, interpreted
        environment |= {"TRITON_INTERPRET": "1"}
        environment |= {"EFFADAM_KERNELS": "triton"} if name in ("kernels", "bandwidth") else {}
    limit_s, start_s = 1.5 * seconds + 20, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.json"
        path.write_text(json.dumps(asdict(Checks())))
        command = [sys.executable, "-m", "gpu_check", "--section", name]
        command += ["--device", device, "--seconds", str(seconds)]
        process = subprocess.Popen(
            command,
            env={**environment, OUTCOMES_VARIABLE: str(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its ranks end with it
        )
        try:
            said = process.communicate(timeout=limit_s)[0]
            how = f"ended with code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
            how = f"was killed after {limit_s:.0f} s"
        checks = json.loads(path.read_text())
    if how:
        one = Outcome(f"section {name}", FAILED, f"The process {how}.\n{said[-2000:]}")
        checks["outcomes"].append(asdict(one))
    return {"name": name, "seconds": time.monotonic() - start_s, **checks}


def print_section(section: dict[str, Any]) -> None:
    for one in section["outcomes"]:
        if one["status"] != PASSED or len(section["outcomes"]) <= 20:
            detail = one["detail"] if one["status"] == FAILED else one["detail"].partition("\n")[0]
            print(f"  {one['status']:8}{one['name']}" + (f": {detail}" if detail else ""))
    passed = sum(one["status"] == PASSED for one in section["outcomes"])
    skipped = sum(one["status"] == SKIPPED for one in section["outcomes"])
    print(
        f"  {passed} of {len(section['outcomes'])} passed, {skipped} skipped, "
        f"{section['seconds']:.0f} s",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[-1]
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all sections (8.5)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"Invalid --minutes: {options.minutes:g}. Must be positive.")
    return options


def main() -> int:
    options = parse()
    if options.section is not None:
        run_here(options.section, options.device, options.seconds)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"There is no GPU: torch {torch.__version__} finds no CUDA or ROCm device, so nothing was "
            "checked. Install a build of torch for the GPU, or try the sections themselves with "
            "--device cpu.",
            file=sys.stderr,
        )
        return NO_GPU
    machine = describe_machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    start_s = time.monotonic()
    end_s = start_s + 60 * options.minutes
    sections: list[dict[str, Any]] = []
    for at, name in enumerate(options.sections):
        remaining_s = end_s - time.monotonic() - min(RESERVE_S, 6 * options.minutes)
        shares = [SECTIONS[one].share for one in options.sections[at:]]
        seconds = remaining_s * shares[0] / sum(shares)
        print(f"{name}, about {max(0.0, seconds):.0f} s", flush=True)
        if seconds < 1:
            outcome = Outcome(f"section {name}", SKIPPED, f"{options.minutes:g} minutes are over")
            section = {"name": name, "seconds": 0.0, **asdict(Checks([outcome]))}
        else:
            # A section may take half as long again, but all of them end in time.
            section = run_apart(name, options.device, min(seconds, (remaining_s - 20) / 1.5))
        sections.append(section)
        print_section(section)
    report = {"machine": machine, "seconds": time.monotonic() - start_s, "sections": sections}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "report.md").write_text(markdown(report))
    failed = sum(one["status"] == FAILED for section in sections for one in section["outcomes"])
    print(f"{failed} checks failed. Report: {options.out / 'report.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
