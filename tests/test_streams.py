"""The order of the exchanges for GPUs, on a stand-in for streams, events, copies and collectives."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future

import bits
from effadam_hook import EffAdamError, attach
from effadam_hook.config import Config
from effadam_hook.exchange import dense
from effadam_hook.exchange import nccl as nccl_module
from effadam_hook.exchange.gloo import GlooExchange
from effadam_hook.exchange.nccl import NcclExchange
from effadam_hook.exchange.staging import PinnedStaging, Staging
from effadam_hook.exchange.topology import hierarchical, rank0, sharded
from effadam_hook.exchange.worker_thread import WorkerThread
from effadam_hook.feedback import unused
from effadam_hook.modes import Content
from effadam_hook.session import connection
from effadam_hook.session.session import ExchangeSession
from effadam_hook.wire import parts
from harness import Died, run_ranks
from stand_in import Device, LateWork, _Event, _Stream, _Watch
from training import ChosenGradients, ddp, drawn_gradients

TOPOLOGIES = ("rank0", "sharded", "hierarchical")
SHAPES = (((37, 13), (53,)), ((301,), (7, 3, 5)))
ACCESSES: dict[str, Callable[..., tuple[list[Tensor], list[Tensor]]]] = {
    "all_reduce": lambda tensor, *_: ([tensor], [tensor]),
    "all_gather_flat": lambda out, value, *_: ([value], [out]),
    "all_to_all_flat": lambda out, value, *_: ([value], [out]),
    "gather_to_first": lambda value, out, *_: ([value], out or []),
    "broadcast_from_first": lambda tensor, group: (
        ([tensor], []) if group.rank() == 0 else ([], [tensor])
    ),
}


class OnDevice(Staging):
    """The memory of the exchange for NCCL, watched."""

    def __init__(self, device: Device) -> None:
        super().__init__(sends_from_host=False, computes_on_host=False)
        self._device = device

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._device.register("payload", torch.zeros(tuple(shape), dtype=dtype))

    def adopt(self, buffer: Tensor) -> Tensor:
        return self._device.register("payload", buffer)


def stand_in_for(device: Device, path: str) -> None:
    """Have this process exchange by a path of GPUs, on a stand-in."""

    def make(topology: Any, group: Any, _: Any, watchdog: Any, held: Any) -> Any:
        if path == "staged":
            staging = PinnedStaging(device, len(topology.stages))
            return GlooExchange(topology, group, staging, watchdog, held)
        exchange = NcclExchange(topology, group, device)
        exchange.staging = OnDevice(device)
        return exchange

    connection.make_exchange = make  # type: ignore[assignment]
    if not device.watches:
        return
    communicators: dict[int, tuple[int, _Stream]] = {}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any) -> Any:
            reads, writes = ACCESSES[name](*args)
            if path == "staged":
                for tensors, is_write in ((reads, False), (writes, True)):
                    for tensor in tensors:
                        device.access(threading.get_ident(), tensor, is_write, name)
                return call(*args)
            group = id(next(a for a in args if isinstance(a, dist.ProcessGroup)))
            if group not in communicators:
                communicators[group] = len(communicators), device.new_stream()
            number, stream = communicators[group]
            return LateWork(
                device, lambda: wait(call(*args)), reads, writes, stream, f"{name} {number}"
            )

        return collective

    for module in (rank0, sharded, hierarchical, dense):
        for name in ACCESSES:
            if hasattr(module, name):
                setattr(module, name, watched(name, getattr(module, name)))

    # What one thread has done before it appends a bucket, it has done before the next thread's work.
    put, run = WorkerThread.put, GlooExchange._run

    def put_with_clock(thread: Any, inflight: Any, job: Any) -> None:
        inflight.clock = dict(device.clock_of(threading.get_ident()))
        put(thread, inflight, job)

    def run_with_clock(exchange: Any, number: int, inflight: Any, job: Any) -> None:
        device.join(threading.get_ident(), inflight.clock)
        run(exchange, number, inflight, job)

    WorkerThread.put = put_with_clock  # type: ignore[method-assign]
    GlooExchange._run = run_with_clock  # type: ignore[method-assign]


def wait(work: Any) -> None:
    if work is not None:
        work.wait()


class Model:
    """Two buckets of a session, on a device; backward and optimizer run on its default stream."""

    def __init__(self, device: Device, rank: int, world_size: int, topology: str) -> None:
        self.device, self.rank = device, rank
        config = Config("lloyd3", "lloyd2", block_size=16, topology=topology, exact=("<60",))
        self.session = ExchangeSession(config)
        if topology == "hierarchical":
            mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]))
            self.session.connection.choice.name_nodes(None, mesh)
        self.buckets = [[torch.zeros(shape) for shape in shapes] for shapes in SHAPES]
        for index, bucket in enumerate(self.buckets):
            for number, tensor in enumerate(bucket):
                device.register(f"parameter {index}.{number}", tensor)
        self.flats = [
            device.register("bucket", torch.zeros(sum(p.numel() for p in bucket)))
            for bucket in self.buckets
        ]
        self.session.agree(torch.device("cpu"))
        self.session.open(torch.device("cpu"))

    def begin(self, step: int) -> list[Future[Tensor]]:
        """Compute gradients and start the exchange."""
        futures = []
        with _Watch(self.device):
            for index, (flat, bucket) in enumerate(zip(self.flats, self.buckets, strict=True)):
                draws = torch.randn(flat.shape, generator=torch.Generator().manual_seed(step))
                flat.copy_(draws.roll(self.rank) * 2**-index)
                if step % 2:
                    flat[: bucket[0].numel()] = 0
                futures.append(self.session.exchange(index, flat, bucket, check_weights=True))
        self.session.release()
        self.session.counters.steps += 1
        return futures

    def step(self, step: int) -> list[Tensor]:
        futures = self.begin(step)
        for future in futures:
            future.wait()
        with _Watch(self.device):
            for flat, bucket in zip(self.flats, self.buckets, strict=True):
                start = 0
                for tensor in bucket:
                    tensor.sub_(flat[start : start + tensor.numel()].view(tensor.shape))
                    start += tensor.numel()
        return [tensor.clone() for bucket in self.buckets for tensor in bucket]


def settle(futures: Sequence[Future[Tensor]]) -> None:
    """Wait on the host alone: no stream is ordered."""
    for future in futures:
        with contextlib.suppress(RuntimeError):
            Future.wait(future)


def without(device: Device, name: str) -> None:
    """Remove one wait."""
    order = nccl_module._order
    if name in ("backward", "bucket is filled"):
        _Stream.wait_stream = _Stream.wait_event = lambda *_: None  # type: ignore[method-assign]
    elif name == "copy":
        _Event.synchronize = lambda _: None  # type: ignore[method-assign]
    elif name == "future":
        device.new_future = Future  # type: ignore[method-assign,assignment]
    elif name == "memory":
        device.keep = lambda *_: None  # type: ignore[method-assign]
    else:
        nccl_module._order = lambda work: None if work.what == name else order(work)


def races_without(
    rank: int, world_size: int, path: str, topology: str, name: str, averages: bool
) -> list[str]:
    """Make two steps, the second without one of the waits, and free a bucket."""
    os.environ["EFFADAM_KERNELS"] = "reference"
    device = Device()
    stand_in_for(device, path)
    if averages:
        Content.averages_first = True
    model = Model(device, rank, world_size, topology)
    model.step(0)
    assert device.races == []
    if name:
        without(device, name)
    with contextlib.suppress(EffAdamError, RuntimeError):
        model.step(1)
        settle(model.begin(2))
    for flat in model.flats:
        device.free(flat)
    model.session.connection.close()
    return device.races


MUTATIONS = [
    # path, topology, wait that is removed, race that is found
    ("nccl", "rank0", "backward", "reads bucket (534,) while aten::copy_ writes"),
    ("nccl", "rank0", "gather_to_first 0", "payload"),
    ("nccl", "rank0", "broadcast_from_first 0", "payload"),
    ("nccl", "sharded", "all_to_all_flat 0", "payload"),
    ("nccl", "sharded", "all_gather_flat 0", "payload"),
    ("nccl", "sharded", "all_reduce 0", "reads bucket"),
    ("nccl", "sharded", "future", "reads bucket (534,) while"),
    ("nccl", "sharded", "memory", "bucket (534,) is freed before"),
    ("nccl", "hierarchical", "all_to_all_flat 0", "payload"),
    ("nccl", "hierarchical", "all_to_all_flat 1", "payload"),
    ("nccl", "hierarchical", "all_gather_flat 1", "payload"),
    ("nccl", "hierarchical", "all_gather_flat 0", "payload"),
    ("staged", "sharded", "bucket is filled", "reads bucket (534,) while aten::copy_ writes"),
    ("staged", "sharded", "copy", "all_to_all_flat reads pinned"),
    ("staged", "sharded", "future", "writes pinned"),
    ("staged", "sharded", "memory", "bucket (534,) is freed before"),
    ("staged", "rank0", "copy", "gather_to_first reads pinned"),
    ("staged", "hierarchical", "copy", "all_to_all_flat reads pinned"),
]


@pytest.mark.parametrize(("path", "topology", "name", "race"), MUTATIONS)
def test_every_wait_is_needed(path: str, topology: str, name: str, race: str) -> None:
    world_size = 4 if topology == "hierarchical" else 2
    averages = name.startswith("all_reduce")
    ranks = run_ranks(races_without, world_size, path, topology, name, averages)
    assert any(race in found for races in ranks for found in races), ranks


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("path", ["nccl", "staged"])
def test_nothing_races(path: str, topology: str) -> None:
    world_size = 4 if topology == "hierarchical" else 3
    for averages in (False, True):
        assert run_ranks(races_without, world_size, path, topology, "", averages) == (
            [[]] * world_size
        )
