"""The order of the FSDP2 path on a GPU, on a stand-in for the streams of FSDP and of the exchange."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.futures import Future

from effadam_hook import EffAdamError, attach
from effadam_hook.fsdp.engine import ShardEngine
from effadam_hook.fsdp.groups import ShardGroup
from effadam_hook.fsdp.hook import ShardHook
from harness import run_ranks
from stand_in import Device, LateWork, _Event, _Stream, _Watch
from test_fsdp import loss_of, mesh_of, sharded
from test_streams import stand_in_for

collectives = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_collectives")
pytestmark = pytest.mark.skipif(
    not hasattr(collectives, "DefaultReduceScatter"), reason="FSDP has other collectives"
)


def stand_in_for_fsdp(device: Device) -> None:
    """Have FSDP run on streams of a stand-in, and watch the tensors that it reduces."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

    torch.cpu.Stream = lambda priority=0: device.new_stream("FSDP's stream")  # type: ignore[assignment,misc]
    torch.cpu.Event = lambda: _Event(device)  # type: ignore[assignment,misc]
    torch.cpu.current_stream = lambda _=None: device.current_stream()  # type: ignore[assignment]
    torch.cpu.stream = device.on  # type: ignore[assignment]
    kind, reduce = collectives.DefaultReduceScatter, param_group.foreach_reduce
    hook = ShardHook._exchange
    scatter, reduced = kind.__call__, []

    def scatter_watched(self: Any, output_tensor: Tensor, *args: Any, **options: Any) -> Any:
        reduced.append(device.register("reduced", output_tensor))
        device.access(device.current_stream(), output_tensor, True, "reduce-scatter")
        return scatter(self, output_tensor, *args, **options)

    def reduce_watched(params: Any, grads: Any, group: Any, stream: Any, *args: Any) -> Any:
        result = reduce(params, grads, group, stream, *args)
        tensor = reduced.pop()
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        local = [param.sharded_param.grad.to_local() for param in params]
        if not any(first <= each.data_ptr() < last for each in local if each.numel()):
            device.free(tensor, stream)
        return result

    def exchange_watched(self: Any, *args: Any) -> None:
        packed = self._packed
        hook(self, *args)
        if self._packed is not packed:
            device.register("packed", self._packed)

    kind.__call__ = scatter_watched
    param_group.foreach_reduce = reduce_watched
    ShardHook._exchange = exchange_watched  # type: ignore[method-assign]


@contextlib.contextmanager
def without(device: Device, name: str) -> Iterator[None]:
    """Remove one wait, or what else the order needs; those of FSDP itself remain."""
    wait_stream, wait_event = _Stream.wait_stream, _Stream.wait_event
    wait, keep = LateWork.wait, device.keep

    def is_fsdp(stream: Any) -> bool:
        return stream.name.startswith("FSDP")

    removed: dict[str, tuple[Any, str, Any]] = {
        "": (device, "fails_at", 0),
        "backward": (
            *(_Stream, "wait_stream"),
            lambda one, other: wait_stream(one, other) if is_fsdp(one) else None,
        ),
        "bucket": (
            *(_Stream, "wait_event"),
            lambda one, event: (
                wait_event(one, event) if is_fsdp(one) or one is device._default else None
            ),
        ),
        "copy": (_Event, "synchronize", lambda _: None),
        "future": (device, "new_future", Future),
        "memory": (device, "keep", lambda t, s: None if is_fsdp(s) else keep(t, s)),
        "reads": (ShardGroup, "makes_views_of", lambda *_: True),
        "end": (ShardEngine, "_end_step", lambda _: None),
    }
    skip = (LateWork, "wait", lambda work, *_: work.what == name or wait(work))
    device.kept_since_now()
    with mock.patch.object(*removed.get(name, skip)):
        yield


def train(device: Device, model: Any, rank: int) -> None:
    """Run a step, one whose gradients are added to it, two micro-batches, and read the gradients."""
    for step in range(4):
        model.set_requires_all_reduce(step != 2)
        loss_of(model, step, rank).backward()
    with _Watch(device):
        for parameter in model.parameters():
            parameter.grad.to_local().clone()
    model.zero_grad()
    loss_of(model, 4, rank).backward()
    with _Watch(device):
        for parameter in model.parameters():
            parameter.grad.to_local().clone()
    model.zero_grad()


def races_without(rank: int, _: int, path: str, names: list[str]) -> dict[str, list[str]]:
    os.environ["EFFADAM_KERNELS"] = "reference"
    device = Device()
    stand_in_for(device, path)
    stand_in_for_fsdp(device)
    mesh, found = mesh_of(2, 2), {}
    for name in names:
        device.races = []
        model = sharded(mesh["shard"], blocks=1)
        state = attach(
            model,
            process_group=mesh.get_group("replicate"),
            quantizer="lloyd3",
            enabled=name != "dense",
        )
        loss_of(model, 0, rank).backward()
        model.zero_grad()
        assert device.races == []
        with (
            without(device, "" if name == "dense" else name),
            contextlib.suppress(EffAdamError, RuntimeError),
        ):
            train(device, model, rank)
            state.session.connection.watchdog.join()  # which orders no stream
        state.close()
        found[name] = device.races
    return found


# The wait that is removed, by path, and a pattern of the race that is found without it.
NEEDED = {
    "nccl": {
        "backward": "reads reduced .* while aten::copy_ writes it",
        "all_to_all_flat, node": "reads payload .* while all_to_all_flat, node writes it",
        "all_gather_flat, node": "reads payload .* while all_gather_flat, node writes it",
        "future": "add_ reads reduced .* while aten::copy_ writes it",
        "memory": "is freed before aten::zero_",
    },
    "staged": {
        "bucket": "reads reduced .* while aten::copy_ writes it",
        "copy": "all_to_all_flat reads pinned .* while a copy writes it",
        "future": "add_ reads reduced .* while aten::copy_ writes it",
        "memory": "is freed before aten::zero_",
        "reads": r"aten::add_? reads reduced|reduced .* while aten::add_? reads",
        "end": r"aten::clone reads reduced|reduced .* while aten::clone reads",
    },
}


@pytest.mark.parametrize("path", NEEDED)
def test_every_wait_of_the_fsdp_path_is_needed_and_nothing_races_with_all_of_them(
    path: str,
) -> None:
    needed = NEEDED[path]
    ranks = run_ranks(races_without, 4, path, ["", "dense", *needed], timeout=150)
    for races in ranks:
        assert races[""] == races["dense"] == []
    for name, race in needed.items():
        found = [each for races in ranks for each in races[name]]
        assert any(re.search(race, each) for each in found), (name, found)
