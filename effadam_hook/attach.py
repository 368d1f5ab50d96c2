"""Registration of the hook on a model, with the mode that its options and optimizer require."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effadam_hook.config.options import (
    HookOptions,
    accepts_options,
    complete_options,
    state_options,
)
from effadam_hook.ddp.auto_compress import check_auto
from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh
from effadam_hook.feedback.parameters import identify
from effadam_hook.fsdp.attach import attach_sharded
from effadam_hook.fsdp.groups import is_sharded
from effadam_hook.hook import efficient_adam_hook
from effadam_hook.modes import GradientMode, Mode, PreconditionedMode, UpdateMode, WeightMode
from effadam_hook.modes.preconditioned import adam_of
from effadam_hook.optim.efficient_adam import EfficientAdam
from effadam_hook.optim.wrappers import describe_kind, unwrapped
from effadam_hook.state import EfficientAdamState

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attach"]


@accepts_options(HookOptions)
def attach(
    ddp_model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    process_group: dist.ProcessGroup | None = None,
    intra_node_group: IntraNodeGroup | None = None,
    device_mesh: NodeMesh | None = None,
    **options: Unpack[HookOptions],
) -> EfficientAdamState:
    """Register the hook on a DDP model, or on one that FSDP2 shards: the one line for existing code.

    A collective operation: all ranks compare their options, package versions and parameters, and all
    of them raise an error if any two differ.

    Gradients of a model with modules that went through ``fully_shard`` over a one-dimensional mesh are
    averaged by FSDP inside the mesh, and exchanged by this hook between its replicas. ``process_group``
    is then required, ``topology="auto"`` is
    ``"sharded"``, and update mode is refused.

    Args:
        ddp_model: The ``DistributedDataParallel`` model, also inside ``torch.compile``, or the sharded
            model, without a communication hook.
        optimizer: An :class:`EfficientAdam`, for update mode; or, with ``precondition``, the
            ``torch.optim.Adam`` or ``AdamW`` of the model. An optimizer inside a wrapper with an
            attribute ``optimizer``, such as those of Accelerate and Lightning, is found.
        grad_scaler: The scaler that multiplies the loss, if there is one. Residuals follow its scale.
        process_group: Process group of the exchange; that of a DDP model by default. For a sharded
            model, that of the replicas of this rank's shards: ``mesh.get_group("replicate")``.
        intra_node_group: Process group of the ranks of this node, see :class:`EfficientAdamState`.
        device_mesh: ``(nodes, ranks of a node)``, see :class:`EfficientAdamState`.
        **options: Options of :class:`effadam_hook.config.options.HookOptions`.

    Returns:
        The registered state.

    Raises:
        TypeError: If ``ddp_model`` is neither a DDP model nor a sharded one, or an option is unknown or
            has the wrong type.
        ValueError: If the value of an option is invalid, or a name pattern in ``exact`` matches no
            parameter.
        EffAdamError: If the model has a communication hook already.
        DisagreementError: On all ranks, if the ranks differ.

    Examples:
        >>> ddp_model = DistributedDataParallel(model)
        >>> state = attach(ddp_model, enabled=args.effadam, quantizer="lloyd4")

        >>> mesh = init_device_mesh("cuda", (nodes, gpus), mesh_dim_names=("replicate", "shard"))
        >>> fully_shard(model, mesh=mesh["shard"])
        >>> state = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd4")
    """
    objects = ("ddp_model", "optimizer", "grad_scaler")
    objects_of_state = ("process_group", "intra_node_group", "device_mesh")
    complete = complete_options(options, HookOptions, beside=(*objects, *objects_of_state))
    if is_sharded(ddp_model):
        return attach_sharded(
            ddp_model,
            optimizer=optimizer,
            grad_scaler=grad_scaler,
            process_group=process_group,
            names_nodes=intra_node_group is not None or device_mesh is not None,
            options=complete,
        )
    ddp_model = _ddp_of(ddp_model)
    taken = _taken_hooks(ddp_model)
    if taken:
        raise EffAdamError(
            f"The model has the communication hook {taken[0][0].__qualname__!r} already, and DDP "
            "takes only one. Attach before any other, or wrap the model anew."
        )
    quantize_weights = complete["quantize_weights"]
    if complete["auto"]:
        check_auto(complete["enabled"], quantize_weights)
    state = EfficientAdamState(
        process_group=process_group,
        intra_node_group=intra_node_group,
        device_mesh=device_mesh,
        **state_options(complete),
    )
    if complete["auto"]:
        state.measure_auto_compress()
    state.grad_scaler = grad_scaler
    exchanged, other_names = _parameters_of(ddp_model)
    warmup_steps = state.config.warmup_steps
    mode = _choose_mode(
        exchanged, optimizer, complete["precondition"], quantize_weights, warmup_steps
    )
    state.use(mode)
    if isinstance(mode, UpdateMode):
        if grad_scaler is not None:
            raise TypeError(
                "Invalid grad_scaler with an EfficientAdam: update mode sends finished updates, which "
                "cannot be unscaled. Train in bfloat16, which needs no scaler, or in gradient mode."
            )
        _check_dense_gradients(ddp_model, exchanged)
        named = [(known.name, tensor) for known, tensor in identify(exchanged)]
        mode.optimizer.recursion.attach_to(named)
    state.bind(exchanged, process_group or ddp_model.process_group, other_names=other_names)
    # Weak: DDP keeps the state in C++, where reference cycles are not collected.
    model = weakref.ref(ddp_model)
    state.watch_join(lambda: (joined := model()) is not None and joined._join_config.enable)
    ddp_model.register_comm_hook(state, efficient_adam_hook)
    return state


def _ddp_of(model: Any) -> DistributedDataParallel:
    """Return the DDP model itself, or the one that torch.compile holds."""
    inner = model
    while isinstance(getattr(inner, "_orig_mod", None), nn.Module):
        inner = inner._orig_mod
    if isinstance(inner, DistributedDataParallel):
        return inner
    kind = type(inner).__name__ if inner is model else f"torch.compile of {type(inner).__name__}"
    raise TypeError(
        f"Invalid ddp_model: {kind}. Must be a DistributedDataParallel, or torch.compile of one, or a "
        "model that fully_shard has sharded: attach after wrapping the model."
    )


def _check_dense_gradients(
    ddp_model: DistributedDataParallel, exchanged: list[tuple[str, Tensor]]
) -> None:
    """Refuse sparse gradients: at once if a module announces them, otherwise in the first backward."""
    trained = [(known.name, p) for known, p in identify(exchanged) if p.requires_grad]
    names = {id(parameter): name for name, parameter in trained}
    for module in ddp_model.module.modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse:
            name = names.get(id(module.weight))
            if name is not None:
                raise _sparse(name, f"belongs to an {type(module).__name__} with sparse=True")
    for name, parameter in trained:
        _check_first_gradient(name, parameter)


def _check_first_gradient(name: str, parameter: Tensor) -> None:
    def check(gradient: Tensor) -> None:
        handle.remove()
        if gradient.is_sparse:  # DDP's own error would not name the parameter
            raise _sparse(name, "has a sparse gradient")

    handle = parameter.register_hook(check)  # type: ignore[no-untyped-call]


def _sparse(name: str, how: str) -> EffAdamError:
    return EffAdamError(
        f"Parameter {name!r} {how}. In update mode gradients must be dense, as in torch.optim.Adam: "
        "use sparse=False, or gradient mode with SparseAdam."
    )


def _taken_hooks(ddp_model: DistributedDataParallel) -> list[Any]:
    """Return the communication hooks that DDP runs.

    A copied DDP model lists the hook of its original, but does not run it: torch builds a new reducer.
    """
    hooks = getattr(ddp_model, "_comm_hooks", None)
    if hooks and all(isinstance(s, EfficientAdamState) and s.is_copy for _, s in hooks):
        hooks.clear()
    return hooks or []


def _parameters_of(
    ddp_model: DistributedDataParallel,
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """Return the parameters that DDP may exchange, frozen ones included, and the names of the others.

    The names compared with DDP's list are those that DDP builds for its reducer. They differ from the
    names of ``named_parameters()``: those of the root module's own parameters begin with a dot.
    """
    module, ignored = ddp_model.module, ddp_model.parameters_to_ignore
    exchanged = {
        id(parameter)
        for prefix, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
        if f"{prefix}.{name}" not in ignored
    }
    named = list(module.named_parameters(remove_duplicate=False))
    return (
        [(name, parameter) for name, parameter in named if id(parameter) in exchanged],
        [name for name, parameter in named if id(parameter) not in exchanged],
    )


def _choose_mode(
    exchanged: list[tuple[str, Tensor]],
    optimizer: Optimizer | None,
    precondition: bool,
    quantize_weights: bool,
    warmup_steps: int,
) -> Mode:
    """Return the mode that the optimizer and the options require."""
    if not precondition:
        optimizer = unwrapped(optimizer, (EfficientAdam,))
    kind = describe_kind(optimizer)
    if quantize_weights and (precondition or not isinstance(optimizer, EfficientAdam)):
        raise TypeError(
            f"Invalid optimizer for quantize_weights=True: {kind}. Must be an "
            "EfficientAdam, without precondition=True."
        )
    if precondition:
        named = ((known.name, parameter) for known, parameter in identify(exchanged))
        return PreconditionedMode(adam_of(optimizer, named))
    if optimizer is None:
        return GradientMode()
    if not isinstance(optimizer, EfficientAdam):
        raise TypeError(
            f"Invalid optimizer: {kind}. Must be an EfficientAdam, for update "
            "mode. Any other optimizer works in gradient mode, without being passed; Adam and "
            "AdamW also with precondition=True."
        )
    if optimizer.second_moment == "frozen" and warmup_steps == 0:
        raise ValueError(
            'Invalid warmup_steps: 0 with second_moment="frozen". Must be 1 or more: the second '
            "moment is estimated during the dense steps, and is zero without them."
        )
    if optimizer.second_moment == "matched" and quantize_weights:
        raise ValueError(
            'Invalid second_moment: "matched" with quantize_weights=True. Must be "local", "shared" or '
            '"frozen": servers apply the updates before any rank could correct them.'
        )
    return WeightMode(optimizer) if quantize_weights else UpdateMode(optimizer)
