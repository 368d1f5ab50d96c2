"""The DDP communication hook, and the one call that registers it.

The only file that knows ``GradBucket``. It has no ``from __future__ import annotations``: DDP compares
a hook's annotations as objects.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effadam_hook.ddp.auto_compress import check_auto
from effadam_hook.errors import EffAdamError
from effadam_hook.feedback.parameters import identify
from effadam_hook.modes import GradientMode, Mode, PreconditionedMode, UpdateMode, WeightMode
from effadam_hook.optim.efficient_adam import EfficientAdam
from effadam_hook.optim.wrappers import unwrapped
from effadam_hook.state import EfficientAdamState

__all__ = ["attach", "efficient_adam_hook"]


def efficient_adam_hook(state: EfficientAdamState, bucket: GradBucket) -> Future[torch.Tensor]:
    """Exchange one gradient bucket, quantized both ways with error feedback on both sides.

    With worker i of N, its gradients g_i, residual e_i, server residual ẽ, quantizers Q_w and Q_s:

    1. worker: ``c_i = g_i + e_i``, ``δ_i = Q_w(c_i)``, ``e_i ← c_i - δ_i``; send the codes of ``δ_i``;
    2. server: ``s = (1/N) Σ_i δ_i + ẽ``, ``δ̃ = Q_s(s)``, ``ẽ ← s - δ̃``; send the codes of ``δ̃``;
    3. everyone, the server's own rank included: the bucket becomes the decoded ``δ̃``.

    Parameters exempt by ``exact`` are averaged uncompressed within the same messages. While the state
    is switched off or warming up, the bucket is averaged by a dense all-reduce.

    Args:
        state: The state, registered together with this hook.
        bucket: DDP's bucket.

    Returns:
        A future of the bucket's buffer, complete after decoding.

    Raises:
        EffAdamError: If DDP hands over something else than a bucket, or the exchange is broken.

    Example:
        >>> ddp_model.register_comm_hook(EfficientAdamState(), efficient_adam_hook)

    Source:
        Efficient-Adam, arXiv 2205.14473; gradient mode exchanges g_i in place of the Adam update.
    """
    if not isinstance(bucket, GradBucket):
        raise EffAdamError(
            f"DDP handed the hook a {type(bucket).__name__} instead of a GradBucket, as its "
            '"python_reducer" does under torch.compile. Set '
            'torch._dynamo.config.optimize_ddp = "ddp_optimizer", the default.'
        )
    return state.run_bucket(bucket.index(), bucket.buffer(), bucket.parameters(), bucket.is_last())


def attach(
    ddp_model: DistributedDataParallel,
    *,
    enabled: bool = True,
    auto: bool = False,
    optimizer: Optimizer | None = None,
    precondition: bool = False,
    grad_scaler: torch.amp.GradScaler | None = None,
    quantize_weights: bool = False,
    **options: Any,
) -> EfficientAdamState:
    """Register the hook on a DDP model: the one line for existing DDP code.

    A collective operation: all ranks compare their options, package versions and parameters, and all
    of them raise if any two differ.

    Args:
        ddp_model: The wrapped model, without a communication hook so far.
        enabled: Whether to compress. ``False`` averages by a dense all-reduce, as plain DDP does, and
            can be switched with ``state.enabled``.
        auto: Whether to find out first if compression makes steps faster here: 8 dense and 8 compressed
            steps are made, 5 of each are timed, and on all ranks the faster kind stays. Says what it
            chose and why in ``state.summary()`` and, at level INFO, in the log. Where dense steps
            win, what the compressed ones left in the residuals, about a step's gradient, stays there.
        optimizer: An :class:`EfficientAdam`, for update mode; or, with ``precondition``, the
            ``torch.optim.Adam`` or ``AdamW`` of the model. One inside a wrapper that holds it as
            ``optimizer``, as Accelerate's and Lightning's do, is found.
        precondition: Whether to quantize the gradient in units of the root of ``optimizer``'s second
            moment, which is worth about one bit and costs none.
        quantize_weights: With an :class:`EfficientAdam`: whether the servers keep the weights and send
            them down quantized by ``server_quantizer``, as Quantized Adam does (arXiv 2004.14180).
        grad_scaler: The scaler that multiplies the loss, where training uses one. Residuals then
            follow its scale.
        **options: Those of :class:`EfficientAdamState`.

    Returns:
        The registered state.

    Raises:
        TypeError: If ``ddp_model`` is no DDP model, an option is unknown or has the wrong type.
        ValueError: If an option has no such value, or a name pattern in ``exact`` matches no parameter.
        EffAdamError: If the model has a communication hook already.
        DisagreementError: On every rank, if the ranks differ.

    Example:
        >>> ddp_model = DistributedDataParallel(model)
        >>> state = attach(ddp_model, enabled=args.effadam, quantizer="lloyd4")
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"Invalid ddp_model: {type(ddp_model).__name__}. Must be a DistributedDataParallel: "
            "attach after wrapping the model."
        )
    taken = _taken_hooks(ddp_model)
    if taken:
        raise EffAdamError(
            f"The model has the communication hook {taken[0][0].__qualname__!r} already, and DDP "
            "takes only one. Attach before any other, or wrap the model anew."
        )
    if auto:
        check_auto(enabled, quantize_weights)
    state = EfficientAdamState(enabled=enabled, **options)
    if auto:
        state.try_out()
    state.grad_scaler = grad_scaler
    warmup = state.config.warmup_steps
    exchanged, other_names = _parameters_of(ddp_model)
    mode = _mode_for(exchanged, optimizer, precondition, quantize_weights, warmup)
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
    group = options.get("process_group") or ddp_model.process_group
    state.bind(exchanged, group, other_names=other_names)
    # Weakly: DDP holds the state from C++, where the garbage collector finds no circles.
    model = weakref.ref(ddp_model)
    state.watch_join(lambda: (joined := model()) is not None and joined._join_config.enable)
    ddp_model.register_comm_hook(state, efficient_adam_hook)
    return state


def _check_dense_gradients(
    ddp_model: DistributedDataParallel, exchanged: list[tuple[str, Tensor]]
) -> None:
    """Refuse sparse gradients: now where modules announce them, otherwise in the first backward."""
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
        if gradient.is_sparse:  # which DDP would refuse without a word of what it is about
            raise _sparse(name, "has a sparse gradient")

    handle = parameter.register_hook(check)  # type: ignore[no-untyped-call]


def _sparse(name: str, how: str) -> EffAdamError:
    return EffAdamError(
        f"Parameter {name!r} {how}. In update mode gradients must be dense, as in torch.optim.Adam: "
        "use sparse=False, or gradient mode with SparseAdam."
    )


def _taken_hooks(ddp_model: DistributedDataParallel) -> list[Any]:
    """The communication hooks that DDP runs.

    A copied DDP lists the hook of its original and does not run it: torch builds its reducer anew.
    """
    hooks = getattr(ddp_model, "_comm_hooks", None)
    if hooks and all(isinstance(s, EfficientAdamState) and s.is_copy for _, s in hooks):
        hooks.clear()
    return hooks or []


def _parameters_of(
    ddp_model: DistributedDataParallel,
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """What DDP exchanges now or after ``requires_grad_()``, and the names of what it ignores.

    Built as DDP builds the list for its reducer, which compares other names than
    ``named_parameters()`` has: those of the root module's own parameters begin with a dot.
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


def _mode_for(
    exchanged: list[tuple[str, Tensor]],
    optimizer: Optimizer | None,
    precondition: bool,
    quantize_weights: bool,
    warmup_steps: int,
) -> Mode:
    kinds: tuple[type[Optimizer], ...] = (EfficientAdam,)
    if precondition:
        kinds = (torch.optim.Adam, torch.optim.AdamW)
    optimizer = unwrapped(optimizer, kinds)
    held = getattr(optimizer, "optimizer", None)
    kind = type(optimizer).__name__ + (f" around {type(held).__name__}" if held is not None else "")
    if quantize_weights and (precondition or not isinstance(optimizer, EfficientAdam)):
        raise TypeError(
            f"Invalid optimizer for quantize_weights=True: {kind}. Must be an "
            "EfficientAdam, without precondition=True."
        )
    if precondition:
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise TypeError(
                f"Invalid optimizer for precondition=True: {kind}. Must be a "
                "torch.optim.Adam or AdamW, whose second moment is the same on all ranks."
            )
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for known, parameter in identify(exchanged):
            if parameter.requires_grad and parameter not in own:
                raise ValueError(
                    "Invalid optimizer for precondition=True: it lacks the parameter "
                    f"{known.name!r}. Must be the optimizer of the DDP model's parameters."
                )
        return PreconditionedMode(optimizer)
    if optimizer is None:
        return GradientMode()
    if not isinstance(optimizer, EfficientAdam):
        raise TypeError(
            f"Invalid optimizer: {kind}. Must be an EfficientAdam, for update "
            "mode. Any other optimizer works in gradient mode, without being handed over; Adam and "
            "AdamW also with precondition=True."
        )
    if optimizer.second_moment == "frozen" and warmup_steps == 0:
        raise ValueError(
            'Invalid warmup_steps: 0 with second_moment="frozen". Must be 1 or more: the second '
            "moment is estimated during the dense steps, and is zero without them."
        )
    return WeightMode(optimizer) if quantize_weights else UpdateMode(optimizer)
