"""One rank's side of a benchmark in a lab, started by :mod:`end_to_end` on every host of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from netlab import read_wire_bytes

from effadam_hook.cli.stepping import Cell, KernelsError, KernelsUsed, check_kernels, run_cells
from effadam_hook.cli.stepping import Plan as AnyPlan
from effadam_hook.exchange.probe import Probe
from effadam_hook.planner.workloads import Workload

__all__ = ["Cell", "KernelsError", "KernelsUsed", "Plan", "check_kernels"]


@dataclass(frozen=True)
class Plan(AnyPlan):
    """What all ranks are to do, with a workload that fits on a command line."""

    def to_json(self) -> str:
        """As text, for the command line of the ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """From what :meth:`to_json` returned."""
        values = json.loads(text)
        values["workload"] = Workload(**values["workload"])
        values["methods"] = tuple(values["methods"])
        return cls(**values)


def wire(probe: Probe) -> tuple[list[int], list[int]]:
    """The links' counters, read on rank 0 while nobody sends."""
    probe.share(None)
    reading: list[list[int]] = []
    if probe.rank == 0:
        now = read_wire_bytes(os.environ["NETLAB_ID"], probe.world_size)
        reading = [list(now.sent), list(now.received)]
    sent, received = probe.share(reading)[0]
    return sent, received


def main() -> None:
    """Run the cells of a plan; rank 0 writes one line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plan")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    plan = Plan.from_json(args.plan)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    total = len(plan.cells())
    is_first = os.environ["RANK"] == "0"
    with args.out.open("a") if is_first else open(os.devnull, "w") as file:  # noqa: PTH123
        for index, cell in enumerate(run_cells(plan, "gloo", torch.device("cpu"), wire)):
            file.write(json.dumps(cell) + "\n")
            file.flush()
            steps = sorted(cell["step_s"])
            median_ms = steps[len(steps) // 2] * 1e3
            if is_first:
                print(f"[{index + 1}/{total}] {cell['method']:24} {median_ms:8.1f} ms", flush=True)
    sys.stdout.flush()
    # Threads of a rival may still wait for something; nothing is left to do.
    os._exit(0)


if __name__ == "__main__":
    main()
