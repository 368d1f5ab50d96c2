"""Rank of a benchmark run in a lab, started by :mod:`end_to_end` for each rank of every host."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from netlab import read_wire_bytes

from effadam_hook.cli.benchmark_run import BenchmarkRun, run_cells
from effadam_hook.exchange.probe import Probe
from effadam_hook.planner.workloads import Workload

__all__ = ["LabRun"]


@dataclass(frozen=True)
class LabRun(BenchmarkRun):
    """Benchmark run that ranks receive on their command line; its task is a :class:`Workload`."""

    def to_json(self) -> str:
        """Convert to text for the command line of the ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LabRun:
        """Convert from the text that :meth:`to_json` returned."""
        values = json.loads(text)
        values["workload"] = Workload(**values["workload"])
        values["methods"] = tuple(values["methods"])
        return cls(**values)


def read_counters(probe: Probe) -> tuple[list[int], list[int]]:
    """Read the links' counters on rank 0, while no rank sends."""
    probe.share(None)
    reading: list[list[int]] = []
    if probe.rank == 0:
        now = read_wire_bytes(os.environ["NETLAB_ID"], int(os.environ["NETLAB_HOSTS"]))
        reading = [list(now.sent), list(now.received)]
    sent, received = probe.share(reading)[0]
    return sent, received


def main() -> None:
    """Run the cells of a benchmark run; rank 0 writes one line of JSON for each cell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    run = LabRun.from_json(args.run)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    total = len(run.cells())
    is_first = os.environ["RANK"] == "0"
    with args.out.open("a") if is_first else open(os.devnull, "w") as file:  # noqa: PTH123
        cells = run_cells(run, "gloo", torch.device("cpu"), read_counters)
        for index, cell in enumerate(cells):
            file.write(json.dumps(cell) + "\n")
            file.flush()
            steps = sorted(cell["step_s"])
            median_ms = steps[len(steps) // 2] * 1e3
            if is_first:
                print(f"[{index + 1}/{total}] {cell['method']:24} {median_ms:8.1f} ms", flush=True)
    sys.stdout.flush()
    # Threads of another library may still be blocked; all results are written.
    os._exit(0)


if __name__ == "__main__":
    main()
