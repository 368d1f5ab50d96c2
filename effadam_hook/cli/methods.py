"""A method made real: the model wrapped in DDP, with the optimizer and hook that the method says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach
from effadam_hook.errors import CommandError
from effadam_hook.planner.method import Method, expand_names

__all__ = ["Prepared", "prepare", "read_methods"]

_ONE_BUCKET_MB = 1 << 16

# DDP refuses torch's own hook by its name unless NCCL runs it. It does no harm on Gloo.
_CASTS: dict[str, Any] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket),  # noqa: PLW0108
}


@dataclass
class Prepared:
    """A model ready to be trained by a method.

    Attributes:
        model: The DDP model.
        optimizer: Its optimizer.
        scope: What every step runs in.
        close: Ends what the method has started.
        state: Ours: the hook's state; None for the others.
    """

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scope: Callable[[], Any]
    close: Callable[[], None]
    state: EfficientAdamState | None = None


def read_methods(text: str, bucket_mb: float | None) -> list[Method]:
    """The methods of a ``--methods`` option.

    Args:
        text: The option's value.
        bucket_mb: The value of ``--bucket-mb``, for all whose name does not say.

    Returns:
        At least one, each of them once.

    Raises:
        CommandError: If there is none, one is there twice, or the buckets have no size.
        ValueError: If a name is unknown.
    """
    if bucket_mb is not None and not 0 < bucket_mb < math.inf:
        raise CommandError(f"Invalid --bucket-mb: {bucket_mb}. Must be above 0, and finite.")
    methods = [Method.parse(name).with_buckets(bucket_mb) for name in expand_names(text)]
    if not methods:
        raise CommandError(
            f"Invalid --methods: {text!r}. Must name one method or more, such as "
            '"fp32,lloyd4/sharded"; leave it out for the usual ones.'
        )
    names: dict[Method, str] = {}
    for method in methods:
        first = names.setdefault(replace(method, name=""), method.name)
        if first is not method.name:
            raise CommandError(
                f"Invalid --methods: {text!r}. {method.name} is the same as {first}, with the same "
                "buckets. Must be each method once: leave one of them out."
            )
    return methods


def prepare(method: Method, model: nn.Module, lr: float = 1e-4) -> Prepared:
    """Wrap a model; a collective operation.

    Args:
        method: How its gradients are averaged.
        model: The bare model, equal on all ranks, on its device.
        lr: Learning rate of Adam, which every method uses.

    Returns:
        What to train.
    """
    cap = _ONE_BUCKET_MB if method.kind == "powersgd" else method.bucket_mb
    ddp = DistributedDataParallel(model, bucket_cap_mb=cap, gradient_as_bucket_view=True)
    if method.kind == "update":
        optimizer: torch.optim.Optimizer = EfficientAdam(ddp.parameters(), lr=lr)
    else:
        optimizer = torch.optim.Adam(ddp.parameters(), lr=lr, fused=True)
    close: Callable[[], None] = _nothing
    ours: EfficientAdamState | None = None
    if method.kind == "cast":
        ddp.register_comm_hook(None, _CASTS[method.quantizer])
    elif method.kind == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=method.rank, start_powerSGD_iter=3
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif method.is_ours:
        given: dict[str, Any] = {"optimizer": optimizer} if method.kind == "update" else {}
        ours = attach(ddp, quantizer=method.quantizer, topology=method.topology, **given)
        close = ours.close
    scope = ddp.no_sync if method.kind == "none" else contextlib.nullcontext
    return Prepared(ddp, optimizer, scope, close, ours)


def _nothing() -> None:
    pass
