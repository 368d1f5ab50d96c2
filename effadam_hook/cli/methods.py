"""Methods from the command line, and models wrapped in DDP with a method's optimizer and hook."""

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

# DDP rejects torch's own hook by its name unless the backend is NCCL. The hook works on Gloo.
_CASTS: dict[str, Any] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket),  # noqa: PLW0108
}


@dataclass
class Prepared:
    """Model ready to be trained with a method.

    Attributes:
        model: The DDP model.
        optimizer: The optimizer.
        scope: Function that returns the context manager in which every step runs.
        close: Function that releases what the method has started.
        state: State of this project's hook; None for other methods.
    """

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scope: Callable[[], Any]
    close: Callable[[], None]
    state: EfficientAdamState | None = None


def read_methods(text: str, bucket_mb: float | None) -> list[Method]:
    """Parse the option ``--methods``.

    Args:
        text: Value of the option.
        bucket_mb: Value of ``--bucket-mb``, for the names without a bucket size.

    Returns:
        At least one method, without duplicates.

    Raises:
        CommandError: If there is no method, a method occurs twice, or the bucket size is invalid.
        ValueError: If a name is unknown.
    """
    if bucket_mb is not None and not 0 < bucket_mb < math.inf:
        raise CommandError(f"Invalid --bucket-mb: {bucket_mb}. Must be above 0 and finite.")
    methods = [Method.parse(name).with_buckets(bucket_mb) for name in expand_names(text)]
    if not methods:
        raise CommandError(
            f"Invalid --methods: {text!r}. Must name at least one method, for example "
            '"fp32,lloyd4/sharded"; omit the option for the default methods.'
        )
    names: dict[Method, str] = {}
    for method in methods:
        first = names.setdefault(replace(method, name=""), method.name)
        if first is not method.name:
            raise CommandError(
                f"Invalid --methods: {text!r}. {method.name} is the same as {first}, with the same "
                "buckets. Each method must occur once: remove one of them."
            )
    return methods


def prepare(method: Method, model: nn.Module, lr: float = 1e-4) -> Prepared:
    """Wrap a model in DDP for a method; a collective operation.

    Args:
        method: The method.
        model: The bare model, equal on all ranks, on its device.
        lr: Learning rate of Adam, the optimizer of every method.

    Returns:
        The model, ready to be trained.
    """
    cap = _ONE_BUCKET_MB if method.kind == "powersgd" else method.bucket_mb
    ddp = DistributedDataParallel(model, bucket_cap_mb=cap, gradient_as_bucket_view=True)
    if method.kind == "update":
        optimizer: torch.optim.Optimizer = EfficientAdam(ddp.parameters(), lr=lr)
    else:
        optimizer = torch.optim.Adam(ddp.parameters(), lr=lr, fused=True)
    close: Callable[[], None] = _nothing
    state: EfficientAdamState | None = None
    if method.kind == "cast":
        ddp.register_comm_hook(None, _CASTS[method.quantizer])
    elif method.kind == "powersgd":
        powersgd = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=method.rank, start_powerSGD_iter=3
        )
        ddp.register_comm_hook(powersgd, powerSGD_hook.powerSGD_hook)
    elif method.is_effadam:
        extra: dict[str, Any] = {"optimizer": optimizer} if method.kind == "update" else {}
        extra |= {"quantizer": method.quantizer, "topology": method.topology}
        state = attach(ddp, **extra)
        close = state.close
    scope = ddp.no_sync if method.kind == "none" else contextlib.nullcontext
    return Prepared(ddp, optimizer, scope, close, state)


def _nothing() -> None:
    pass
