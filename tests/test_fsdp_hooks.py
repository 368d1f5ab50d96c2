"""Groups of FSDP2 that nobody would average, and what is none of them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import EffAdamError, attach
from harness import run_ranks
from test_fsdp import WIDTH, WORDS, Net, fsdp, loss_of, mesh_of, sharded


def _shard_late(mesh: DeviceMesh) -> None:
    model = Net()
    fsdp.fully_shard(model.blocks[0], mesh=mesh["shard"])
    with pytest.warns(UserWarning, match="neither FSDP nor this hook"):
        attach(model, process_group=mesh.get_group("replicate"))
    fsdp.fully_shard(model, mesh=mesh["shard"])
    loss_of(model, 0, 0)


def _replace(mesh: DeviceMesh) -> None:
    model = sharded(mesh["shard"])
    attach(model, process_group=mesh.get_group("replicate"))
    model.head = nn.Linear(WIDTH, WORDS)
    loss_of(model, 0, 0)


def _unfreeze(mesh: DeviceMesh) -> None:
    model = Net()
    model.words.requires_grad_(False)
    model.scale.requires_grad_(False)
    for module in (*model.blocks, model.head):
        fsdp.fully_shard(module, mesh=mesh["shard"])
    attach(model, process_group=mesh.get_group("replicate"))
    model.words.requires_grad_(True)
    loss_of(model, 0, 0)


def _overwrite(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model: Any = fsdp.fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    attach(model, process_group=mesh.get_group("replicate"))
    model(torch.ones(1, 4)).sum().backward()
    model.set_all_reduce_hook(lambda reduced: None)  # the only group: ours is never called again
    model(torch.ones(1, 4))


def _overwrite_on_one_replica(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model: Any = fsdp.fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    attach(model, process_group=mesh.get_group("replicate"))
    model(
        torch.ones(1, 4)
    ).sum().backward()  # opens the exchange, through which ranks report errors
    if mesh.get_local_rank("replicate") == 0:
        model.set_all_reduce_hook(lambda reduced: None)
    model(torch.ones(1, 4)).sum().backward()


def _close_early(mesh: DeviceMesh) -> None:
    model = sharded(mesh["shard"])
    attach(model, process_group=mesh.get_group("replicate")).close()
    state = attach(model, process_group=mesh.get_group("replicate"))  # takes the place of the first
    loss_of(model, 0, 0).backward()
    assert state.steps == 1
    state.close()
    loss_of(model, 0, 0).backward()


def _without_hooks(rank: int, _: int) -> list[str]:
    mesh = mesh_of(2, 2)
    messages = []
    for act in (
        _shard_late,
        _replace,
        _unfreeze,
        _overwrite,
        _overwrite_on_one_replica,
        _close_early,
    ):
        with pytest.raises(EffAdamError) as raised:
            act(mesh)
        messages.append(str(raised.value))
    return messages


def test_groups_that_nobody_would_average_are_an_error_on_every_rank() -> None:
    expected = [
        "went through fully_shard after attach, such as '(root)'",
        "such as 'head.bias', and are in no module",
        "unfrozen after attach, such as 'words.weight'",
        "'_overwrite.<locals>.<lambda>' after attach",
        "'_overwrite_on_one_replica.<locals>.<lambda>' after attach",
        "was closed",
    ]
    for rank, messages in enumerate(run_ranks(_without_hooks, 4, timeout=150)):
        for message, part in zip(messages, expected, strict=True):
            assert part in message
        own = f"{rank % 2}, {rank % 2 + 2}"
        assert f"Ranks 0 to 1 are the global ranks {own}." in messages[0]


def _frozen_teacher(mesh: DeviceMesh) -> None:
    model = sharded(mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"))
    teacher = nn.Linear(4, 4).requires_grad_(False)
    model.teacher = fsdp.fully_shard(teacher, mesh=mesh)  # over both dimensions
    loss_of(model, 0, 0).backward()
    assert state.steps == 1


def _frozen_teacher_before(mesh: DeviceMesh) -> None:
    model = Net()
    teacher = nn.Linear(4, 4).requires_grad_(False)
    model.teacher = fsdp.fully_shard(teacher, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"))
    loss_of(model, 0, 0).backward()
    assert state.steps == 1
    teacher.requires_grad_(True)
    state.close()
    with pytest.raises(ValueError, match="the module 'teacher' is sharded over a mesh of two dim"):
        attach(model, process_group=mesh.get_group("replicate"))


def _wrapped_later(mesh: DeviceMesh) -> None:
    model = Net()
    ignored = {model.blocks[0][0].weight}
    fsdp.fully_shard(model, mesh=mesh["shard"], ignored_params=ignored)
    with pytest.warns(UserWarning, match="neither FSDP nor this hook"):
        state = attach(model, process_group=mesh.get_group("replicate"))
    apply_activation_checkpointing(model, check_fn=lambda module: module is model.blocks[0])
    loss_of(model, 0, 0).backward()
    assert state.steps == 1


def _wrapped_before(mesh: DeviceMesh) -> None:
    model = Net()
    apply_activation_checkpointing(model, check_fn=lambda module: module is model.blocks[0])
    for module in (*model.blocks[1:], model.head):
        fsdp.fully_shard(module, mesh=mesh["shard"])
    with pytest.warns(UserWarning, match="[0-9]+ trainable parameters") as warned:
        state = attach(model, process_group=mesh.get_group("replicate"))
    unmanaged = [name for name, _ in model.named_parameters() if not is_managed(name)]
    assert f"{len(unmanaged)} trainable parameters" in str(warned[0].message)
    assert warned[0].filename == __file__
    loss_of(model, 0, 0).backward()
    assert state.steps == 1


def is_managed(name: str) -> bool:
    return name.startswith("head.") or (name.startswith("blocks.") and name[7] != "0")


def _closed_states_are_freed(mesh: DeviceMesh) -> None:
    model = sharded(mesh["shard"])
    engines = []
    for _ in range(3):
        state = attach(model, process_group=mesh.get_group("replicate"))
        loss_of(model, 0, 0).backward()
        state.close()
        engines.append(weakref.ref(state.engine))
        del state
    gc.collect()
    assert [engine() is not None for engine in engines][:2] == [False, False]
    assert len(model._forward_pre_hooks) <= 2


def _no_alarms(rank: int, _: int) -> None:
    mesh = mesh_of(2, 2)
    for act in (
        _frozen_teacher,
        _frozen_teacher_before,
        _wrapped_later,
        _wrapped_before,
        _closed_states_are_freed,
    ):
        act(mesh)
    dist.barrier()


def test_frozen_modules_wrappers_and_closed_states_are_no_reason_for_an_error() -> None:
    run_ranks(_no_alarms, 4, timeout=150)
