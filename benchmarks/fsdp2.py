"""Measure time and bytes of a step of a sharded model, on the links of a lab.

    sudo python benchmarks/fsdp2.py --rate 200mbit

FSDP2 shards the model over the ranks of each host, which reach one another without the link. Between
the hosts run in turn FSDP's own all-reduce (native HSDP, in float32 and in bfloat16) and the exchange
of this project, in one set of processes and several rounds. A step is forward, backward and optimizer,
from the end of one step to the end of the next, on the slowest rank. Bytes are those of the busiest
link in its busier direction, as counted by the kernel, headers included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from netlab import LabError, Link, NetLab, RankError, read_wire_bytes, run_in_lab
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from effadam_hook import attach

_NATIVE = {"hsdp fp32": torch.float32, "hsdp bf16": torch.bfloat16}
_MARK = "cell: "


def build(mode: str, mesh: DeviceMesh, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Shard a stack of square linear layers, each a parameter group, for one mode.

    Returns:
        The model and its state; None for FSDP's own all-reduce.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(args.width, args.width) for _ in range(args.layers)]
    model: Any = nn.Sequential(*layers)
    own = mesh if mode in _NATIVE else mesh["shard"]
    policy = MixedPrecisionPolicy(reduce_dtype=_NATIVE.get(mode, torch.float32))
    for layer in layers:
        fully_shard(layer, mesh=own, mp_policy=policy)
    fully_shard(model, mesh=own, mp_policy=policy)
    if mode in _NATIVE:
        return model, None
    return model, attach(model, process_group=mesh.get_group("replicate"), quantizer=mode)


def measure(mode: str, mesh: DeviceMesh, args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of one mode; a collective operation.

    Returns:
        Milliseconds of each timed step, and megabytes a step through the busiest link.
    """
    model, state = build(mode, mesh, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randn(args.rows, args.width)
    ends = []
    before = None
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            before = read_counters()
            ends.append(time.perf_counter())
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        time.sleep(args.sleep_ms / 1e3)
        loss.backward()
        optimizer.step()
        if step >= args.warmup:
            ends.append(time.perf_counter())
    after = read_counters()
    times = torch.tensor(ends, dtype=torch.float64).diff()
    gathered = [torch.empty_like(times) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, times)
    slowest = torch.stack(gathered).max(0).values * 1e3
    if state is not None:
        state.close()
    busiest = (after - before).busiest / args.steps / 1e6 if after and before else 0.0
    return {"mode": mode, "ms": slowest.tolist(), "mb": busiest}


def read_counters() -> Any:
    """Read the links on rank 0, while no rank sends."""
    dist.barrier()
    reading = None
    if dist.get_rank() == 0:
        reading = read_wire_bytes(os.environ["NETLAB_ID"], int(os.environ["NETLAB_HOSTS"]))
    dist.barrier()
    return reading


def run_rank(args: argparse.Namespace) -> None:
    """Measure all modes in several rounds; rank 0 prints a line of JSON for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shards = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (dist.get_world_size() // shards, shards)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for number in range(args.rounds):
        start = number * len(args.modes) // args.rounds
        for mode in args.modes[start:] + args.modes[:start]:
            cell = measure(mode, mesh, args)
            if dist.get_rank() == 0:
                print(_MARK + json.dumps(cell), flush=True)
    sys.stdout.flush()
    os._exit(0)  # no thread of a library can keep the process


def show(cells: Sequence[dict[str, Any]], modes: Sequence[str], lab: NetLab) -> str:
    """Format the table, with ratios to the first mode."""
    lines = [
        f"{lab.shape}, {lab.link.name}",
        f"{'between hosts':<16}{'step ms':>9}{'p20':>8}{'p80':>8}{'ratio':>8}"
        f"{'busiest MB':>12}{'ratio':>8}",
    ]
    first: tuple[float, float] | None = None
    for mode in modes:
        own = [cell for cell in cells if cell["mode"] == mode]
        steps = sorted(ms for cell in own for ms in cell["ms"])
        median, mb = statistics.median(steps), statistics.median(cell["mb"] for cell in own)
        first = first or (median, mb)
        low, high = steps[len(steps) // 5], steps[-1 - len(steps) // 5]
        lines.append(
            f"{mode:<16}{median:9.1f}{low:8.1f}{high:8.1f}{median / first[0]:8.3f}{mb:12.3f}"
            f"{mb / first[1]:8.3f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Build the lab, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2, metavar="M")
    parser.add_argument("--ranks-per-host", type=int, default=2, metavar="G")
    parser.add_argument("--rate", default="200mbit", help="rate of each link (default %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay between hosts")
    parser.add_argument("--modes", default=",".join([*_NATIVE, "lloyd4", "lloyd2"]))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per round and mode")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32, help="rows of input per rank")
    parser.add_argument("--sleep-ms", type=float, default=60.0, help="stands for computing")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.modes = args.modes.split(",")
    if args.rank:
        run_rank(args)
    try:
        link = Link.parse(args.rate, args.delay_ms)
        with NetLab(args.hosts, link, args.ranks_per_host) as lab:
            command = [sys.executable, str(Path(__file__)), "--rank", *sys.argv[1:]]
            output = run_in_lab(lab, command)[0]
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    cells = [
        json.loads(line.removeprefix(_MARK))
        for line in output.splitlines()
        if line.startswith(_MARK)
    ]
    print(show(cells, args.modes, lab))
    return 0


if __name__ == "__main__":
    sys.exit(main())
