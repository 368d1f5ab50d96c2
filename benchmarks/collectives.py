"""Measure bare Gloo collectives, and compare them with the time that the link needs for their bytes.

    sudo python benchmarks/collectives.py --rate 1gbit
    sudo python benchmarks/collectives.py --rate 200mbit --payload-kb 100 1600

The ranks run nothing else: no model, no kernels. The payload is the message of one worker to all
servers. The floor is the time that the counted bytes take on the busiest link in its busier direction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from netlab import LabError, Link, NetLab, RankError, read_wire_bytes, run_in_lab
from torch import Tensor

from effadam_hook.exchange.collectives import all_gather_flat, gather_to_first

Pattern = Callable[[Tensor, Tensor, dist.ProcessGroup], None]
_LINE = "{:<24}{:>12}{:>12}{:>10}{:>12}{:>10}"


def _wait(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


def _all_reduce(payload: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    # The same number of bytes as in the other patterns, as float32.
    _wait(dist.all_reduce(payload.view(-1).view(torch.float32), group=group, async_op=True))


def _all_to_all(payload: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(dist.all_to_all_single(out.view(-1), payload.view(-1), group=group, async_op=True))


def _all_gather(payload: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(all_gather_flat(out.view(-1), payload[0], group))


def _gather(payload: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    rows = list(out.unbind(0)) if group.rank() == 0 else None
    _wait(gather_to_first(payload[0], rows, group))


def _broadcast(payload: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(dist.broadcast(payload.view(-1), src=0, group=group, async_op=True))


def _sends(payload: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    out[rank].copy_(payload[rank])
    works = []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        works.append(dist.irecv(out[source], source, group=group))
        works.append(dist.isend(payload[to], to, group=group))
    for work in works:
        _wait(work)


PATTERNS: dict[str, Pattern] = {
    "all_reduce, float32": _all_reduce,
    "all_to_all": _all_to_all,
    "the same by isend/irecv": _sends,
    "all_gather": _all_gather,
    "gather": _gather,
    "broadcast": _broadcast,
}


def measure(payload_bytes: int, repeats: int) -> list[dict[str, object]]:
    """Time every pattern; return the rows on rank 0, and an empty list on other ranks."""
    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    stride = payload_bytes // size // 8 * 8
    payload = torch.zeros(size, stride, dtype=torch.uint8)
    out = torch.empty_like(payload)
    rows = []
    for name, pattern in PATTERNS.items():
        pattern(payload, out, group)
        times = torch.empty(repeats, dtype=torch.float64)
        dist.barrier()
        before = read_wire_bytes(os.environ["NETLAB_ID"], size) if rank == 0 else None
        for index in range(repeats):
            dist.barrier()
            start = time.monotonic()
            pattern(payload, out, group)
            times[index] = time.monotonic() - start
        dist.barrier()
        after = read_wire_bytes(os.environ["NETLAB_ID"], size) if rank == 0 else None
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        if before is not None and after is not None:
            wire = after - before
            busiest = max(*wire.sent, *wire.received) / repeats
            rows.append({"pattern": name, "busiest": busiest, "times": times.tolist()})
    return rows


def main() -> int:
    """Build the lab, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--rate", default="1gbit", help="rate of each link, for example 200mbit")
    parser.add_argument("--payload-kb", type=int, nargs="+", default=[64, 512, 3200])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_out is not None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = {kb: measure(kb * 1000, args.repeats) for kb in args.payload_kb}
        if dist.get_rank() == 0:
            args.rank_out.write_text(json.dumps(result))
        dist.destroy_process_group()
        return 0
    try:
        link = Link.parse(args.rate)
        with NetLab(args.hosts, link) as lab, tempfile.TemporaryDirectory(prefix="netlab-") as tmp:
            out = Path(tmp) / "rows.json"
            run_in_lab(lab, [sys.executable, __file__, *sys.argv[1:], "--rank-out", str(out)])
            result = json.loads(out.read_text())
    except (LabError, RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.hosts} hosts, {link.name}, {args.repeats} repeats, median of the slowest rank")
    print(_LINE.format("pattern", "payload KB", "busiest KB", "floor ms", "median ms", "x floor"))
    for kb, rows in result.items():
        for row in rows:
            floor = 1e3 * link.seconds(row["busiest"])
            median = 1e3 * statistics.median(row["times"])
            print(
                f"{row['pattern']:<24}{kb:>12}{row['busiest'] / 1e3:>12.1f}{floor:>10.2f}"
                f"{median:>12.2f}{median / floor:>10.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
