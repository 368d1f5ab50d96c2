"""Registration of the hook on the parameter groups of a model that FSDP2 shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from effadam_hook.config.options import HookOptions, state_options
from effadam_hook.ddp.auto_compress import check_auto
from effadam_hook.errors import EffAdamError, warn_caller
from effadam_hook.exchange.agreement import check_agreement
from effadam_hook.exchange.topology import AUTO, HIERARCHICAL
from effadam_hook.fsdp.groups import ShardGroup, find_groups, name_shards
from effadam_hook.fsdp.hook import ShardHook
from effadam_hook.fsdp.hook_check import HookCheck
from effadam_hook.fsdp.state import ShardedState
from effadam_hook.modes import GradientMode, Mode, PreconditionedMode
from effadam_hook.modes.preconditioned import adam_of

__all__ = ["attach_sharded"]


def attach_sharded(
    model: nn.Module,
    *,
    optimizer: Optimizer | None,
    grad_scaler: torch.amp.GradScaler | None,
    process_group: dist.ProcessGroup | None,
    names_nodes: bool,
    options: HookOptions,
) -> ShardedState:
    """Register the hook on a sharded model; a collective operation of replicas and shard meshes.

    Args:
        model: A model with modules that went through ``fully_shard``.
        optimizer: With ``precondition``, the Adam or AdamW of the model; otherwise None.
        grad_scaler: The scaler that multiplies the loss, if there is one.
        process_group: The process group of the replicas of this rank's shards.
        names_nodes: Whether the user has named the nodes.
        options: All options.

    Returns:
        The registered state.

    Raises:
        TypeError: If ``process_group`` is missing, or the optimizer is not supported.
        ValueError: If the model, the group or an option is not supported.
        EffAdamError: If a group has an all-reduce hook already.
        DisagreementError: On all ranks, if the ranks differ.
    """
    groups = find_groups(model)
    _check_options(options, names_nodes)
    group = _check_group(process_group, groups)
    for each in groups:
        each.check_free()
    if options["topology"] == AUTO:  # FSDP's mesh is the node: the group has one rank of it
        options["topology"] = "sharded"
    state = ShardedState(process_group=group, **state_options(options))
    if options["auto"]:
        check_auto(options["enabled"], options["quantize_weights"])
        state.measure_auto_compress()
    state.take_groups(groups)
    state.grad_scaler = grad_scaler
    named, others = name_shards(model, groups)
    state.use(_choose_mode(named, groups, optimizer, options["precondition"]))
    _warn_of_unmanaged(others)
    _agree(state, named, [name for name, _ in others], groups)
    hooks = [ShardHook(state.engine, index, each) for index, each in enumerate(groups)]
    for each, hook in zip(groups, hooks, strict=True):
        each.set_hook(hook, hook.drop_kept)
    state.engine.check_hooks = HookCheck(model, groups, hooks, others)
    state.engine.release = model.register_forward_pre_hook(state.engine.check_before_forward).remove
    return state


def _check_options(options: HookOptions, names_nodes: bool) -> None:
    if options["topology"] == HIERARCHICAL or names_nodes:
        raise ValueError(
            f"Invalid topology: {HIERARCHICAL!r}, or named nodes, for a sharded model. Must be "
            '"sharded", "rank0" or "auto": FSDP averages inside the shard mesh already.'
        )
    if options["quantize_weights"]:
        raise ValueError("Invalid quantize_weights: True for a sharded model. Must be False.")


def _check_group(group: dist.ProcessGroup | None, groups: list[ShardGroup]) -> dist.ProcessGroup:
    if group is None:
        raise TypeError(
            "Invalid process_group: None for a sharded model. Must be the group of the replicas of "
            'this rank\'s shards: attach(model, process_group=mesh.get_group("replicate"), ...).'
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"Invalid process_group: {group!r}. Must be a process group, such as "
            'mesh.get_group("replicate").'
        )
    own = set(dist.get_process_group_ranks(group))
    for each in groups:
        shared = sorted(own & set(dist.get_process_group_ranks(each.shard_group)))
        if shared != [dist.get_rank()]:
            raise ValueError(
                f"Invalid process_group: the ranks {shared} are in it and in the shard mesh of the "
                f"module {each.name or '(root)'!r}. Must be the group of the replicas of this "
                'rank\'s shards, which has only this rank of the mesh: mesh.get_group("replicate").'
            )
    return group


def _choose_mode(
    named: list[tuple[str, Tensor]],
    groups: list[ShardGroup],
    optimizer: Optimizer | None,
    precondition: bool,
) -> Mode:
    if not precondition:
        if optimizer is not None:
            raise TypeError(
                f"Invalid optimizer: {type(optimizer).__name__} for a sharded model. Must be None, or "
                "a torch.optim.Adam or AdamW with precondition=True: update mode does not support "
                "sharded parameters. Any optimizer works in gradient mode, without being passed."
            )
        return GradientMode()
    shards = {id(shard.owner): shard for group in groups for shard in group.shards}
    if any(group.offloads and group.device.type != "cpu" for group in groups):
        raise ValueError(
            "Invalid precondition: True with CPUOffloadPolicy. Must be False: the second moments are "
            "in the memory of the CPU."
        )
    adam = adam_of(optimizer, [(name, shards[id(owner)].parameter) for name, owner in named])

    def parameter_of(owner: Tensor) -> object:
        return shards[id(owner)].parameter

    return PreconditionedMode(adam, parameter_of)


def _warn_of_unmanaged(others: list[tuple[str, nn.Parameter]]) -> None:
    trained = [name for name, parameter in others if parameter.requires_grad]
    if trained:
        warn_caller(
            f"{len(trained)} trainable parameters, such as {trained[0]!r}, are in no module that went "
            "through fully_shard: neither FSDP nor this hook averages their gradients. Call "
            "fully_shard on the root module last, before attach.",
        )


def _agree(
    state: ShardedState,
    named: list[tuple[str, Tensor]],
    others: list[str],
    groups: list[ShardGroup],
) -> None:
    """Compare replicas, then shard meshes, so that no rank waits in FSDP for one that has failed."""
    engine = state.engine
    engine.position = {
        each.name: [each.shard_group.rank(), each.shard_group.size()] for each in groups
    }
    failure: Exception | None = None
    try:
        state.bind(named, other_names=others)
    except Exception as error:
        failure = error
    description = {**engine.describe(), **state.config.to_dict(), "mode": state.session.mode.name}
    for each in {id(each.shard_group): each for each in groups}.values():
        found = _disagreement(failure or description, each)
        failure = failure or found
    if failure is not None:
        if isinstance(failure, EffAdamError):
            raise engine.with_global_ranks(failure) from failure.__cause__
        raise failure


def _disagreement(description: dict[str, Any] | Exception, each: ShardGroup) -> Exception | None:
    try:
        check_agreement(description, each.shard_group, each.device)
    except Exception as error:
        return error
    return None
