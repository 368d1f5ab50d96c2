"""The order of the exchanges for GPUs, on a stand-in for streams, events, copies and collectives."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future

import bits
from effadam_hook import EffAdamError, attach
from effadam_hook.config import Config
from effadam_hook.errors import UnsupportedBackendError
from effadam_hook.exchange import dense
from effadam_hook.exchange import gloo as gloo_module
from effadam_hook.exchange import nccl as nccl_module
from effadam_hook.exchange.collectives import wire_device
from effadam_hook.exchange.dense import DenseExchange
from effadam_hook.exchange.exchange import check_backend
from effadam_hook.exchange.gloo import GlooExchange
from effadam_hook.exchange.nccl import NcclExchange
from effadam_hook.exchange.staging import PinnedStaging, Staging
from effadam_hook.exchange.topology import hierarchical, rank0, sharded
from effadam_hook.exchange.worker_thread import WorkerThread
from effadam_hook.modes import Content
from effadam_hook.session import connection
from effadam_hook.session.session import ExchangeSession
from effadam_hook.wire import parts
from harness import Died, run_ranks
from stand_in import Device, LateWork, _Event, _Stream, _Watch
from test_faults_values import MaybeUsed
from training import ChosenGradients, ddp, drawn_gradients

NODES = [[0, 2], [1, 3]]
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
    for name, module in list(sys.modules.items()):
        if name.startswith("effadam_hook") and hasattr(module, "streams_of"):
            module.streams_of = lambda _: device  # type: ignore[attr-defined]
    if path == "nccl":
        dense.backend_of = lambda *_: "nccl"
    if not device.watches:
        return
    communicators: dict[Any, _Stream] = {}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any) -> Any:
            reads, writes = ACCESSES[name](*args)
            if path == "staged" and not device.holds(args[0]):
                for tensors, is_write in ((reads, False), (writes, True)):
                    for tensor in tensors:
                        device.access(threading.get_ident(), tensor, is_write, name)
                return call(*args)
            for tensor in (*reads, *writes):
                if not device.holds(tensor):
                    device.register("temporary", tensor)
            group = next(a for a in args if isinstance(a, dist.ProcessGroup))
            what = f"{name}, {kind_of(group)}"
            if group not in communicators:
                communicators[group] = device.new_stream("communicator")
            run = partial(finish, call, args)
            keeps = path == "staged"
            return LateWork(device, run, reads, writes, communicators[group], what, keeps)

        return collective

    for module in (rank0, sharded, hierarchical, dense, gloo_module, nccl_module):
        for name in ACCESSES:
            if hasattr(module, name):
                setattr(module, name, watched(name, getattr(module, name)))

    # What one thread has done before it appends a bucket, it has done before the next thread's work.
    put, run, end = WorkerThread.put, GlooExchange._run, DenseExchange._finish

    def put_with_clock(thread: Any, inflight: Any, job: Any) -> None:
        inflight.clock = dict(device.clock_of(threading.get_ident()))
        put(thread, inflight, job)

    def run_with_clock(exchange: Any, number: int, inflight: Any, job: Any) -> None:
        device.join(threading.get_ident(), inflight.clock)
        run(exchange, number, inflight, job)

    def end_with_clock(exchange: Any, inflight: Any, works: Any) -> None:
        device.join(threading.get_ident(), inflight.clock)
        end(exchange, inflight, works)

    WorkerThread.put = put_with_clock  # type: ignore[method-assign]
    DenseExchange._finish = end_with_clock  # type: ignore[method-assign]
    GlooExchange._run = run_with_clock  # type: ignore[method-assign]


def kind_of(group: dist.ProcessGroup) -> str:
    """The ranks that a group connects."""
    if group.size() == dist.get_world_size():
        return "all"
    return "node" if dist.get_process_group_ranks(group) in NODES else "peers"


def finish(call: Callable[..., Any], args: Any) -> None:
    """Run a collective to its end."""
    work = call(*args)
    if work is not None:
        work.wait()


class Model:
    """Two buckets of a session, on a device; backward and optimizer run on its default stream."""

    def __init__(self, device: Device, rank: int, world_size: int, topology: str) -> None:
        self.device, self.rank = device, rank
        self.is_dense = topology == "dense"
        topology = "sharded" if self.is_dense else topology
        config = Config("lloyd3", "lloyd2", block_size=16, topology=topology, exact=("<60",))
        self.session = ExchangeSession(config)
        if topology == "hierarchical":
            self.session.connection.choice.name_nodes(None, mesh())
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
                if self.is_dense:
                    futures.append(self.session.average(index, flat, bucket))
                else:
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

    def watch_residuals(self) -> None:
        """Watch the residuals, which the first step has made."""
        for side in (self.session.worker, self.session.server):
            for _, residual in side:
                self.device.register("residual", residual)

    def save(self) -> None:
        """Read residuals, as a state that is saved after an interrupted backward."""
        self.session.settle()
        with _Watch(self.device):
            for side in (self.session.worker, self.session.server):
                for _, residual in side:
                    residual.clone()


def mesh() -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(NODES))


def settle(futures: Sequence[Future[Tensor]]) -> None:
    """Wait on the host alone: no stream is ordered."""
    for future in futures:
        with contextlib.suppress(RuntimeError):
            Future.wait(future)


@contextlib.contextmanager
def without(device: Device, name: str) -> Iterator[None]:
    """Remove one wait, or what else the order needs."""
    wait = LateWork.wait
    device.kept_since_now()
    removed: dict[str, list[tuple[Any, str, Any]]] = {
        "": [],
        "backward": [(_Stream, "wait_stream", lambda *_: None)],
        "bucket": [(_Stream, "wait_event", lambda *_: None)],
        "copy": [(_Event, "synchronize", lambda _: None)],
        "copy of the mean": [(_Event, "synchronize", lambda _: None)],
        "future": [(device, "new_future", Future)],
        "memory": [(device, "keep", lambda *_: None)],
        "settling": [(kind, "settle", lambda _: None) for kind in (NcclExchange, PinnedStaging)],
    }
    skip = (LateWork, "wait", lambda work, *_: work.what == name or wait(work))
    with contextlib.ExitStack() as stack:
        for patched in removed.get(name, [skip]):
            stack.enter_context(mock.patch.object(*patched))
        yield


def races_without(
    rank: int, world_size: int, path: str, topology: str, names: Sequence[str]
) -> dict[str, list[str]]:
    """For each wait: train without it after a first step, and free a bucket."""
    os.environ["EFFADAM_KERNELS"] = "reference"
    device = Device()
    stand_in_for(device, path)
    models, found = [], {}
    for name in names:
        device.races = []
        Content.averages_first = name in ("all_reduce, all", "copy of the mean", "dense")
        models.append(model := Model(device, rank, world_size, topology))
        model.session.mode.max_grad_norm = 1.0 if name == "all_reduce, node" else None
        model.step(0)
        assert device.races == []
        model.watch_residuals()
        with without(device, "" if name == "dense" else name):
            with contextlib.suppress(EffAdamError, RuntimeError):
                model.step(1)
                settle(model.begin(2))
            for flat in model.flats:
                device.free(flat)
            model.save()
        model.session.connection.close()
        found[name] = device.races
    return found


# The wait that is removed, by path and topology, and the race that is found without it.
NEEDED = {
    ("nccl", "rank0"): {
        "backward": "reads bucket (534,) while aten::copy_ writes it",
        "gather_to_first, all": "reads payload (2, ",
        "broadcast_from_first, all": "reads payload (1, ",
    },
    ("nccl", "sharded"): {
        "all_to_all_flat, all": "reads payload (2, ",
        "all_gather_flat, all": "reads payload (2, ",
        "all_reduce, all": "reads bucket (534,) while all_reduce, all writes it",
        "future": "reads bucket (534,) while aten::copy_ writes it",
        "memory": "bucket (534,) is freed before",
        "settling": "aten::clone reads residual",
    },
    ("nccl", "hierarchical"): {
        "all_to_all_flat, node": "reads payload",
        "all_to_all_flat, peers": "reads payload",
        "all_gather_flat, peers": "reads payload",
        "all_gather_flat, node": "reads payload",
        "all_reduce, node": "reads temporary (1,) while all_reduce, node writes it",
    },
    ("nccl", "dense"): {
        "backward": "div_ writes bucket (534,) while aten::copy_ writes it",
        "all_reduce, all": "reads bucket (534,) while all_reduce, all writes it",
        "future": "reads bucket (534,) while all_reduce, all writes it",
        "memory": "bucket (534,) is freed before",
    },
    ("staged", "dense"): {
        "all_reduce, all": "reads bucket (534,) while all_reduce, all writes it",
        "future": "reads bucket (534,) while all_reduce, all writes it",
    },
    ("staged", "rank0"): {"copy": "gather_to_first reads pinned"},
    ("staged", "sharded"): {
        "bucket": "reads bucket (534,) while aten::copy_ writes it",
        "copy": "all_to_all_flat reads pinned",
        "copy of the mean": "div_ writes pinned (2136,) while a copy writes it",
        "future": "writes pinned (2, ",
        "memory": "bucket (534,) is freed before",
        "settling": "aten::clone reads residual",
    },
    ("staged", "hierarchical"): {"copy": "all_to_all_flat reads pinned"},
}


@pytest.mark.parametrize(("path", "topology"), NEEDED)
def test_every_wait_is_needed_and_nothing_races_with_all_of_them(path: str, topology: str) -> None:
    world_size = 4 if topology == "hierarchical" else 2
    needed = NEEDED[path, topology]
    ranks = run_ranks(
        *(races_without, world_size, path, topology, ["", "dense", *needed]), timeout=150
    )
    for races in ranks:
        assert races[""] == races["dense"] == []
    for name, race in needed.items():
        assert any(race in found for races in ranks for found in races[name]), (name, ranks)


# Results


def bounded(
    rank: int, world_size: int, path: str, most: float
) -> tuple[list[list[Tensor]], list[str]]:
    """Train with a bound on the norm of the node's mean gradient, by a path of GPUs or on the host."""
    os.environ["EFFADAM_KERNELS"] = "reference"
    device = Device()
    if path:
        stand_in_for(device, path)
    model = Model(device, rank, world_size, "hierarchical")
    model.session.mode.max_grad_norm = most
    weights = [model.step(step) for step in range(4)]
    model.session.connection.close()
    return weights, device.races


def test_a_bound_on_the_nodes_mean_has_the_bits_of_the_host_and_no_races() -> None:
    expected = run_ranks(bounded, 4, "", 1.0)
    free = run_ranks(bounded, 4, "", 1e6)
    assert not torch.equal(expected[0][0][-1][0], free[0][0][-1][0])
    for path in ("nccl", "staged"):
        for (weights, races), (wanted, _) in zip(
            run_ranks(bounded, 4, path, 1.0), expected, strict=True
        ):
            assert races == []
            for step, (got, want) in enumerate(zip(weights, wanted, strict=True)):
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), step


def staged_as_on_the_host(
    rank: int, world_size: int, topology: str, mode: str, part_numel: int
) -> tuple[list[Any], list[Any], int]:
    """Train for 50 steps twice, on the host and with staging, over a resume in the middle."""
    parts.PART_NUMEL = part_numel
    payloads = bits._watch_payloads()
    options: dict[str, Any] = {"device_mesh": mesh()} if topology == "hierarchical" else {}
    attach_plainly = bits.attach
    bits.attach = lambda model, **given: attach_plainly(model, **given, **options)
    on_host = bits._train(rank, "lloyd3", topology, mode, payloads)
    device = Device(watches=False)
    stand_in_for(device, "staged")
    staged = bits._train(rank, "lloyd3", topology, mode, payloads)
    return on_host, staged, device.copies


@pytest.mark.parametrize(
    ("topology", "mode"),
    [
        *(("rank0", "gradient"), ("rank0", "weights"), ("sharded", "preconditioned")),
        *(("sharded", "update"), ("hierarchical", "gradient"), ("hierarchical", "update")),
    ],
)
def test_staging_has_the_bits_of_the_host(topology: str, mode: str) -> None:
    world_size = 4 if topology == "hierarchical" else 3
    arguments = (world_size, topology, mode, 1000)
    for on_host, staged, copies in run_ranks(staged_as_on_the_host, *arguments, timeout=150):
        assert on_host == staged
        assert copies >= 300


class Placed:
    """Kernels that record payloads outside the memory of the device, which a GPU could not reach."""

    name = "placed"

    def __init__(self, kernels: Any, device: Device, outside: list[str]) -> None:
        for name, payloads in (("encode_", [3]), ("reduce_encode_", [3, 6]), ("decode", [1])):
            setattr(self, name, partial(self._run, name, payloads, kernels, device, outside))

    def _run(
        self,
        name: str,
        payloads: Any,
        kernels: Any,
        device: Any,
        outside: Any,
        *args: Any,
        **k: Any,
    ) -> None:
        outside += [name for at in payloads if args[at].numel() and not device.holds(args[at])]
        getattr(kernels, name)(*args, **k)


def payloads_outside(rank: int, world_size: int, topology: str) -> tuple[list[str], float]:
    device, outside = Device(watches=False), list[str]()
    stand_in_for(device, "staged")
    select = connection.select
    connection.select = lambda _: Placed(select(_), device, outside)  # type: ignore[assignment]
    model = ddp(ChosenGradients())
    options: dict[str, Any] = {"device_mesh": mesh()} if topology == "hierarchical" else {}
    state = attach(model, topology=topology, **options)
    model(drawn_gradients(rank, 0)).backward()
    return outside, state.stats()["quantization_error"]


@pytest.mark.parametrize("topology", ["rank0", "hierarchical"])
def test_kernels_use_the_memory_of_the_device_for_statistics_too(topology: str) -> None:
    for outside, error in run_ranks(payloads_outside, 4, topology):
        assert outside == [] and error > 0


def unused_on_the_device(
    rank: int, world_size: int, topology: str, quantizer: str, path: str
) -> tuple[list[Tensor], list[str]]:
    """Train with unused parameters, one of them on one rank only, then shadow ranks with data."""
    if path != "host":
        stand_in_for(Device(watches=False), path)
    model = ddp(MaybeUsed(dtype=torch.float64), find_unused_parameters=True)
    up, _, down = quantizer.partition(" up, ")
    options: dict[str, Any] = {"device_mesh": mesh()} if topology == "hierarchical" else {}
    state = attach(model, quantizer=up, server_quantizer=down or None, topology=topology, **options)
    wrong = []
    for step in range(6):
        gradients: list[Tensor | None] = list(drawn_gradients(rank, step, dtype=torch.float64))
        gradients[3] = None if step % 2 else gradients[3]
        gradients[0] = gradients[0] if rank == 1 else None
        before = {key: r.clone() for r_ in sides(state) for key, r in r_}
        model.zero_grad()
        model(gradients).backward()
        after = {key: r.clone() for r_ in sides(state) for key, r in r_}
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        if step % 2 and any(key.endswith("weights.3") for key in changed):
            wrong.append(f"step {step}: {changed}")
    with model.join():
        for step in range(6, 8 + rank):
            model.zero_grad()
            model(list(drawn_gradients(rank, step, dtype=torch.float64))).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*grads, *(r.clone() for r_ in sides(state) for _, r in r_)], wrong


def sides(state: Any) -> tuple[Any, Any]:
    return state.session.worker, state.session.server


@pytest.mark.parametrize(
    ("topology", "quantizer"),
    [("rank0", "sign"), ("sharded", "none up, lloyd3"), ("hierarchical", "lloyd2")],
)
def test_residuals_of_unused_parameters_and_shadowing_ranks_keep_on_the_device(
    topology: str, quantizer: str
) -> None:
    world_size = 4 if topology == "hierarchical" else 3
    host, device = (
        run_ranks(unused_on_the_device, world_size, topology, quantizer, path, timeout=100)
        for path in ("host", "staged")
    )
    for (expected, wrong), (got, also_wrong) in zip(host, device, strict=True):
        assert wrong == also_wrong == []
        assert len(got) == len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_stand_in_notices_a_wait_of_the_host() -> None:
    device = Device()
    bucket = device.register("bucket", torch.ones(8))
    with _Watch(device):
        float(bucket[0])
    assert device.races == ["the host waits for bucket (8,)"]


# Failures


def fail(rank: int, world_size: int, topology: str, how: str) -> str:
    device = Device(watches=False)
    stand_in_for(device, "staged")
    model = ddp(ChosenGradients())
    options: dict[str, Any] = {"device_mesh": mesh()} if topology == "hierarchical" else {}
    attach(model, quantizer="lloyd3", topology=topology, **options)
    model(drawn_gradients(rank, 0)).backward()
    if rank == 1 and how == "error":
        device.fails_at = device.copies + 5
    if rank == 1 and how == "receive":
        device.refuses = True
    if rank == 1 and how == "death":
        _Event.synchronize = lambda _: os._exit(3)  # type: ignore[assignment,method-assign]
    try:
        for step in range(1, 4):
            model(drawn_gradients(rank, step)).backward()
    except EffAdamError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("topology", "how"),
    [
        *(("rank0", "error"), ("rank0", "receive"), ("sharded", "error")),
        *(("hierarchical", "error"), ("hierarchical", "receive")),
    ],
)
def test_an_error_in_a_copy_is_named_on_every_rank(topology: str, how: str) -> None:
    for said in run_ranks(fail, 4 if topology == "hierarchical" else 3, topology, how):
        assert "Rank 1" in said and "an illegal memory access" in said


@pytest.mark.parametrize("topology", ["rank0", "sharded", "hierarchical"])
def test_a_rank_that_dies_between_copy_and_send_is_an_error_on_the_others(topology: str) -> None:
    world_size = 4 if topology == "hierarchical" else 3
    first, second, *others = run_ranks(fail, world_size, topology, "death", may_die={1})
    assert second == Died(3)
    assert all("ank 1" in said for said in (first, *others))


# Backends


def test_cuda_runs_over_gloo_and_over_nccl() -> None:
    def group(**backends: str) -> Any:
        devices = [torch.device(name) for name in backends]
        return SimpleNamespace(
            _device_types=devices,
            _get_backend=lambda device: SimpleNamespace(name=lambda: backends[device.type]),
        )

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert check_backend(group(cpu="gloo", cuda="gloo"), cuda) == "gloo"
    assert check_backend(group(cpu="gloo", cuda="nccl"), cuda) == "nccl"
    assert check_backend(group(cuda="nccl"), cuda) == "nccl"
    assert check_backend(group(cpu="gloo"), cpu) == "gloo"
    assert wire_device(group(cpu="gloo", cuda="gloo"), cuda) == cpu
    assert wire_device(group(cpu="gloo", cuda="nccl"), cuda) == cuda
    for wrong in (group(cuda="gloo"), group(cpu="gloo", cuda="ucc")):
        with pytest.raises(UnsupportedBackendError, match="Must be gloo on cpu"):
            check_backend(wrong, cuda)
