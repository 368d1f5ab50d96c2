"""Every way to average gradients that the benchmarks compare, by name.

==========================  ==================================================================
``none``                    no communication at all, under ``no_sync()``: the ceiling
``fp32``                    DDP's own all-reduce
``fp16`` ``bf16``           torch's hooks of that name, the latter without its refusal of Gloo
``powersgd1`` .. ``4``      torch's PowerSGD hook of that rank, all parameters in one bucket: with
                            two or more buckets it hangs or aborts on Gloo
``lloyd4`` and the like     this project, gradient mode, at that quantizer
``update:lloyd2``           this project, update mode (``EfficientAdam``)
==========================  ==================================================================

Ours take ``/rank0`` or ``/sharded`` behind the quantizer. Any method takes ``@5`` at the end: DDP
buckets of 5 MB in place of its default of 25.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdam, EfficientAdamState, attach

__all__ = ["Method", "Prepared"]

_ONE_BUCKET_MB = 1 << 16


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


@dataclass(frozen=True)
class Method:
    """A method, as its name says.

    Attributes:
        name: The name, see the module.
        kind: ``"none"``, ``"dense"``, ``"cast"``, ``"powersgd"``, ``"gradient"`` or ``"update"``.
        quantizer: Ours: the quantizer. ``"cast"``: the dtype.
        topology: Ours: who is the server.
        rank: PowerSGD's.
        bucket_mb: DDP's ``bucket_cap_mb``; None is its default.
    """

    name: str
    kind: str
    quantizer: str = ""
    topology: str = "sharded"
    rank: int = 0
    bucket_mb: float | None = None

    @classmethod
    def parse(cls, name: str) -> "Method":
        """The method of a name.

        Args:
            name: See the module.

        Returns:
            The method.
        """
        rest, _, cap = name.partition("@")
        bucket_mb = float(cap) if cap else None
        if rest in ("none", "fp32"):
            return cls(name, {"none": "none", "fp32": "dense"}[rest], bucket_mb=bucket_mb)
        if rest in ("fp16", "bf16"):
            return cls(name, "cast", rest, bucket_mb=bucket_mb)
        if rest.startswith("powersgd"):
            return cls(name, "powersgd", rank=int(rest.removeprefix("powersgd")))
        kind = "update" if rest.startswith("update:") else "gradient"
        quantizer, _, topology = rest.removeprefix("update:").partition("/")
        return cls(name, kind, quantizer, topology or "sharded", bucket_mb=bucket_mb)

    def prepare(self, model: nn.Module, lr: float = 1e-4) -> Prepared:
        """Wrap a model; a collective operation.

        Args:
            model: The bare model, equal on all ranks.
            lr: Learning rate of Adam, which every method uses.

        Returns:
            What to train.
        """
        cap = _ONE_BUCKET_MB if self.kind == "powersgd" else self.bucket_mb
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap, gradient_as_bucket_view=True)
        if self.kind == "update":
            optimizer: torch.optim.Optimizer = EfficientAdam(ddp.parameters(), lr=lr)
        else:
            optimizer = torch.optim.Adam(ddp.parameters(), lr=lr, fused=True)
        close: Callable[[], None] = _nothing
        ours: EfficientAdamState | None = None
        if self.kind == "cast":
            ddp.register_comm_hook(None, _CASTS[self.quantizer])
        elif self.kind == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self.rank, start_powerSGD_iter=3
            )
            ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.kind in ("gradient", "update"):
            given: dict[str, Any] = {"optimizer": optimizer} if self.kind == "update" else {}
            ours = attach(ddp, quantizer=self.quantizer, topology=self.topology, **given)
            close = ours.close
        scope = ddp.no_sync if self.kind == "none" else contextlib.nullcontext
        return Prepared(ddp, optimizer, scope, close, ours)


def _nothing() -> None:
    pass


def _bf16_on_gloo(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What ``bf16_compress_hook`` does; DDP refuses that one by its name unless NCCL runs it."""
    group = dist.group.WORLD
    assert group is not None
    cast = bucket.buffer().to(torch.bfloat16).div_(group.size())
    work = dist.all_reduce(cast, group=group, async_op=True)
    assert work is not None

    def back(_: torch.futures.Future[Any]) -> torch.Tensor:
        out: torch.Tensor = bucket.buffer().copy_(cast)
        return out

    done: torch.futures.Future[torch.Tensor] = work.get_future().then(back)
    return done


_CASTS = {"fp16": default_hooks.fp16_compress_hook, "bf16": _bf16_on_gloo}


def names(text: str) -> Iterator[str]:
    """Names from a comma-separated list in which ``{a,b}`` stands for either."""
    depth, start = 0, 0
    for index, letter in enumerate(text + ","):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            yield from _expand(text[start:index].strip())
            start = index + 1


def _expand(name: str) -> Iterator[str]:
    before, brace, rest = name.partition("{")
    if not brace:
        if name:
            yield name
        return
    choices, _, after = rest.partition("}")
    for choice in choices.split(","):
        yield from _expand(before + choice + after)
