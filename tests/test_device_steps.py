"""Steps of the exchange for GPUs, with interpreted Triton kernels: their bits and allocations."""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import bits
from effadam_hook import EfficientAdam, attach
from effadam_hook.kernels.cpu import CpuKernels
from effadam_hook.session.session import ExchangeSession
from harness import run_ranks
from kernel_cases import needs_library
from stand_in import Device, _Event, _Stream
from test_faults_values import MaybeUsed
from test_streams import mesh, stand_in_for
from training import ddp, drawn_gradients

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="gpu-check runs them natively"),
]


def use(shapes: tuple[tuple[int, ...], ...], topology: str, **options: Any) -> None:
    """Train models of few elements, with these options; every third step uses nothing."""
    if topology == "hierarchical":
        options["device_mesh"] = mesh()
    attach, gradients = bits.attach, bits._gradients

    def some(rank: int, step: int) -> list[Tensor]:
        return [gradient * (step % 3 > 0) for gradient in gradients(rank, step)]

    bits.SHAPES = shapes
    bits.attach = lambda model, **given: attach(model, **{**given, **options})
    bits._gradients = some


def on_host_and_staged(rank: int, world_size: int, topology: str) -> tuple[list[int], list[int]]:
    """Train for 50 steps with compiled kernels on the host, and with interpreted ones and staging."""
    use(((5, 13),), topology, scale_rule="absmax", block_size=16)
    payloads = bits._Payloads()
    on_host = bits._train(rank, "lloyd3", topology, "gradient", payloads)
    os.environ["EFFADAM_KERNELS"] = "triton"
    stand_in_for(Device(watches=False), "staged")
    return on_host, bits._train(rank, "lloyd3", topology, "gradient", payloads)


@needs_library
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("rank0", marks=pytest.mark.slow),
        pytest.param("sharded", marks=pytest.mark.slow),
        "hierarchical",
    ],
)
def test_interpreted_kernels_with_staging_have_the_bits_of_the_host(topology: str) -> None:
    """With scales from the largest element, which are the only ones of a single order."""
    world_size = 4 if topology == "hierarchical" else 2
    for on_host, staged in run_ranks(on_host_and_staged, world_size, topology, timeout=150):
        assert on_host == staged


class Allocations(TorchDispatchMode):
    """Record the operators that return new memory, with the lines that call them."""

    def __init__(self, found: collections.Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
        if any(address(t) not in given for t in made):
            calls = [f for f in traceback.extract_stack() if "effadam_hook" in f.filename][-2:]
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in calls]
            self._found[f"{func} in {', '.join(lines)}"] += 1
        return result


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CountingDevice(Device):
    """A device that counts what the threads of the exchange allocate."""

    def __init__(self) -> None:
        super().__init__(watches=False)
        self.found: collections.Counter[str] = collections.Counter()
        self.counts = False

    @contextlib.contextmanager
    def on(self, stream: _Stream) -> Iterator[None]:
        with super().on(stream), self.counting():
            yield

    def counting(self) -> contextlib.AbstractContextManager[object]:
        return Allocations(self.found) if self.counts else contextlib.nullcontext()


def allocations(rank: int, world_size: int, path: str, topology: str, mode: str) -> dict[str, int]:
    """Return what warm steps allocate, in all threads, except for the interpreter of the kernels."""
    from triton.runtime import interpreter

    os.environ["EFFADAM_KERNELS"] = "triton"
    device = CountingDevice()
    stand_in_for(device, path)
    use(((13, 7), (5,)), topology)
    interpret = interpreter.GridExecutor.__call__

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return interpret(*args, **kwargs)

    def counted(name: str) -> Any:
        call = getattr(ExchangeSession, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            with device.counting():
                return call(*args, **kwargs)

        return method

    names = ("begin_step", "exchange", "release", "restore_unused")
    methods = {name: counted(name) for name in names}
    model, optimizer, _ = bits._build("lloyd3", topology, mode)
    with (
        mock.patch.multiple(ExchangeSession, **methods),
        mock.patch.object(interpreter.GridExecutor, "__call__", uncounted),
    ):
        for step in range(6):
            device.counts = step >= 4  # DDP's rebuild of the buckets is over
            optimizer.zero_grad()
            model(bits._gradients(rank, step)).backward()
            optimizer.step()
    return dict(device.found)


@pytest.mark.parametrize(
    ("path", "topology", "mode"),
    [
        *(("nccl", "rank0", "gradient"), ("nccl", "sharded", "weights")),
        *(("staged", "sharded", "update"), ("staged", "hierarchical", "preconditioned")),
    ],
)
def test_a_warm_step_allocates_nothing(path: str, topology: str, mode: str) -> None:
    world_size = 4 if topology == "hierarchical" else 2
    assert run_ranks(allocations, world_size, path, topology, mode) == [{}] * world_size


# Waits


class HostReads(TorchDispatchMode):
    """Record the lines of the exchange in which this thread reads a device, or waits for it.

    Tensors for the host alone are made with ``device="cpu"``, and others for the device of the bucket.
    """

    OPERATORS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "is_nonzero",
    )
    METHODS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self._patches = contextlib.ExitStack()
        self._paused = False

    def see(self, what: str) -> None:
        calls = [f for f in traceback.extract_stack() if "effadam_hook" in f.filename][-2:]
        if calls and not self._paused and threading.current_thread() is threading.main_thread():
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in calls]
            self.found[f"{what} in {', '.join(lines)}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in self.OPERATORS:
            self.see(str(func))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for name in self.METHODS:
            self._patch(Tensor, name, lambda args, kwargs: True)
        self._patch(torch, "tensor", lambda args, kwargs: kwargs.get("device", "cpu") != "cpu")
        self._patch(torch, "as_tensor", lambda args, kwargs: kwargs.get("device", "cpu") != "cpu")
        self._patch(_Event, "synchronize", lambda args, kwargs: True)
        executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
        names = ("encode_", "reduce_encode_", "decode")
        for owner, name in ((executor, "__call__"), *((CpuKernels, name) for name in names)):
            run = self._unseen(getattr(owner, name))
            self._patches.enter_context(mock.patch.object(owner, name, run))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _patch(self, owner: Any, name: str, waits: Callable[[Any, Any], bool]) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if waits(args, kwargs):
                self.see(name)
            return call(*args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, watched))

    def _unseen(self, interpret: Callable[..., Any]) -> Callable[..., Any]:
        def unseen(*args: Any, **kwargs: Any) -> Any:
            paused, self._paused = self._paused, True
            try:
                with _disable_current_modes():
                    return interpret(*args, **kwargs)
            finally:
                self._paused = paused

        return unseen


SHAPES = ((13, 7), (5,), (9, 9))
MADE: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient, scaled": {"scaler": True},
    "preconditioned, scaled": {"precondition": True, "scaler": True},
    **{f"update, {kind}": {"second_moment": kind} for kind in ("local", "matched", "shared")},
    "update, bounded": {"second_moment": "matched", "max_grad_norm": 1.0},
    "weights": {"second_moment": "local", "quantize_weights": True},
}


def train(rank: int, topology: str, made: dict[str, Any], watch: Any, steps: int) -> Any:
    """Train, with half of the parameters unused in every third step; watch all steps but the first."""
    model = ddp(MaybeUsed(SHAPES), find_unused_parameters=True)
    options = {"device_mesh": mesh()} if topology == "hierarchical" else {}
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=2**-10)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**10, growth_interval=2, enabled="scaler" in made
    )
    if "second_moment" in made:
        kinds = ("second_moment", "max_grad_norm")
        settings = {key: made[key] for key in kinds if key in made}
        optimizer = EfficientAdam(model.parameters(), lr=2**-10, **settings)
        options |= {"optimizer": optimizer}
    if "precondition" in made:
        options |= {"optimizer": optimizer, "precondition": True}
    if "scaler" in made:
        options |= {"grad_scaler": scaler}
    if "quantize_weights" in made:
        options |= {"quantize_weights": True}
    state = attach(model, quantizer="lloyd3", topology=topology, **options)
    for step in range(steps):
        with watch if step >= 4 else contextlib.nullcontext():
            optimizer.zero_grad()
            gradients: list[Any] = list(drawn_gradients(rank, step, SHAPES))
            if step % 3 == 2:
                gradients[2] = None
            loss = model(gradients)
            if "second_moment" in made:
                loss.backward()
                optimizer.step()
                continue
            if step == 5:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    weights = [p.detach().clone() for p in model.parameters()]
    return weights, state.stats()["worker_residual_norm"], state.state_dict()["worker"]


def waits(
    rank: int, world_size: int, path: str, topology: str, kernels: str
) -> dict[str, dict[str, int]]:
    os.environ["EFFADAM_KERNELS"] = kernels
    stand_in_for(Device(watches=False), path)
    found = {}
    omitted = {"weights"} if topology == "hierarchical" else set()
    if kernels == "triton":  # interpreted, which takes long
        omitted = MADE.keys() - {"preconditioned, scaled", "update, matched"}
    for name in sorted(MADE.keys() - omitted):
        watch = HostReads()
        train(rank, topology, MADE[name], watch, 9)
        found[name] = dict(watch.found)
    return found


@needs_library
@pytest.mark.parametrize(
    ("path", "kernels", "topology"),
    [
        *(("nccl", "cpu", topology) for topology in ("rank0", "sharded", "hierarchical")),
        *(("staged", "cpu", topology) for topology in ("rank0", "sharded", "hierarchical")),
        ("nccl", "triton", "sharded"),
    ],
)
def test_the_training_thread_waits_for_no_device(path: str, kernels: str, topology: str) -> None:
    world_size = 4 if topology == "hierarchical" else 2
    for found in run_ranks(waits, world_size, path, topology, kernels, timeout=100):
        assert found == {name: {} for name in found}


def scaled(rank: int, world_size: int, path: str) -> Any:
    os.environ["EFFADAM_KERNELS"] = "reference"
    if path:
        stand_in_for(Device(watches=False), path)
    return train(rank, "sharded", MADE["gradient, scaled"], contextlib.nullcontext(), 12)


@pytest.mark.parametrize("path", ["nccl", "staged"])
def test_residuals_on_a_device_follow_the_loss_scale_as_on_the_host(path: str) -> None:
    for host, device in zip(run_ranks(scaled, 2, ""), run_ranks(scaled, 2, path), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(host[0], device[0], strict=True))
        assert host[1] == device[1] > 0
        assert all(torch.equal(host[2][name], device[2][name]) for name in host[2])
