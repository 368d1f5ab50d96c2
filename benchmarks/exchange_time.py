"""Rank of :mod:`model_check` that times the exchange of a whole model without training.

All buckets are passed to the exchange at once, as if backward took no time. An exchange ends when the
last rank has its last result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effadam_hook import EfficientAdamState
from effadam_hook.cli.benchmark_run import between_ends
from effadam_hook.exchange.probe import Probe
from effadam_hook.planner.method import Method
from effadam_hook.planner.traffic import ParameterSize, make_buckets
from effadam_hook.planner.workloads import Workload
from effadam_hook.session.session import exchange_all

Exchange = Callable[[], None]

_WARMUP = 6  # until connections are established and TCP's windows have grown


def buckets_of(model: nn.Module, bucket_mb: float | None) -> list[list[Tensor]]:
    """Return the model's parameters, divided into DDP's buckets."""
    parameters = [p.detach() for p in model.parameters()]
    sizes = [ParameterSize(p.numel(), p.shape[0] if p.ndim > 1 else 0) for p in parameters]
    rest = list(reversed(parameters))
    return [[rest.pop(0) for _ in bucket] for bucket in make_buckets(sizes, bucket_mb)]


@contextlib.contextmanager
def make_exchange(method: Method, buckets: list[list[Tensor]]) -> Iterator[Exchange]:
    """Yield a function that runs the exchange of a method until it is complete on this rank."""
    buffers = [torch.randn(sum(p.numel() for p in bucket)) for bucket in buckets]
    if method.is_effadam:
        state = EfficientAdamState(quantizer=method.quantizer, topology=method.topology)
        try:
            yield lambda: exchange_all(state.session, buffers, buckets)
        finally:
            state.close()
        return

    def dense() -> None:
        sent = [buffer.half() if method.kind == "cast" else buffer for buffer in buffers]
        works = [dist.all_reduce(each.div_(dist.get_world_size()), async_op=True) for each in sent]
        for work, each, buffer in zip(works, sent, buffers, strict=True):
            work.wait()
            if method.kind == "cast":
                buffer.copy_(each)

    yield dense


def measure(name: str, workload: Workload, repeats: int) -> float:
    """Measure the median seconds of an exchange."""
    method = Method.parse(name)
    group = dist.group.WORLD
    assert group is not None
    probe = Probe(group, torch.device("cpu"))
    with make_exchange(method, buckets_of(workload.model(), method.bucket_mb)) as run:
        for _ in range(_WARMUP):
            run()
        probe.share(None)
        start = time.perf_counter()
        ends = []
        for _ in range(repeats):  # without barriers: a pause would reset TCP's windows
            run()
            ends.append(time.perf_counter() - start)
        return statistics.median(between_ends(probe.share(ends)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods")
    parser.add_argument("workload", help="layers,width,rows")
    parser.add_argument("repeats", type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    workload = Workload(*map(int, args.workload.split(",")))
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    medians = {name: measure(name, workload, args.repeats) for name in args.methods.split(",")}
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(medians))
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
