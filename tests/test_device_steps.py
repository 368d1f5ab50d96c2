"""Steps of the exchange for GPUs, with interpreted Triton kernels: their bits and allocations."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import bits
from effadam_hook.session.session import ExchangeSession
from harness import run_ranks
from kernel_cases import needs_library
from stand_in import Device, _Stream
from test_streams import mesh, stand_in_for

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
