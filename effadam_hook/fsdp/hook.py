"""The all-reduce hook of one parameter group of FSDP2."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from effadam_hook.exchange.streams import streams_of
from effadam_hook.fsdp.engine import ShardEngine
from effadam_hook.fsdp.groups import Shard, ShardGroup

__all__ = ["ShardHook"]


class ShardHook:
    """Average the reduced tensor of a parameter group over the replicas, in place.

    Padding is not exchanged: a tensor with padding is packed first.

    Args:
        engine: The backward passes of the model.
        index: Index of the group in the model.
        group: The group.
    """

    def __init__(self, engine: ShardEngine, index: int, group: ShardGroup) -> None:
        self._engine = engine
        self._index = index
        self._group = group
        self._packed = torch.empty(0)
        self._kept = torch.empty(0)
        self._has_kept = False

    @property
    def is_closed(self) -> bool:
        """Return whether the state was closed, so that another hook may take this place."""
        return self._engine.session.connection.is_closed

    def __call__(self, reduced: Tensor) -> None:
        """Average a reduced tensor.

        Args:
            reduced: ``[padded numel]``, the gradients of this rank's shards, reduced over the shard
                mesh; overwritten with the result.

        Raises:
            EffAdamError: If the exchange has failed, or the tensor does not fit the group.
        """
        streams = streams_of(reduced.device)
        if streams is not None:
            # FSDP may free the tensor while this stream has yet to read it.
            streams.keep(reduced, streams.current_stream())
        try:
            shards = self._group.trainable(reduced)
        except Exception as error:  # the other replicas would wait for this one
            self._engine.fail(f"bucket {self._index}", error)
        if not self._group.is_last_microbatch:
            self._keep(reduced)
            return
        if self._has_kept:
            reduced += self._kept
            self._has_kept = False
        self._follow_weights(shards)
        own = [shard for shard in shards if shard.numel]
        if own:
            self._exchange(reduced, shards, own)

    def _exchange(self, reduced: Tensor, shards: list[Shard], own: list[Shard]) -> None:
        owners = [shard.owner for shard in own]
        defers = self._group.makes_views_of(reduced, shards)
        if all(shard.numel == shard.padded_numel for shard in shards):
            then = partial(self._scale, reduced)
            self._engine.reduce(
                self._index, reduced.device, owners, lambda: reduced, then, defers=defers
            )
            return
        padded = torch.split(reduced, [shard.padded_numel for shard in shards])
        parts = [
            part[: shard.numel] for part, shard in zip(padded, shards, strict=True) if shard.numel
        ]
        numels = [shard.numel for shard in own]
        if self._packed.numel() != sum(numels) or self._packed.dtype != reduced.dtype:
            self._packed = reduced.new_empty(sum(numels))
        flat = self._packed
        packed = torch.split(flat, numels)

        def pack() -> Tensor:
            torch._foreach_copy_(packed, parts)
            return flat

        def unpack() -> None:
            torch._foreach_copy_(parts, packed)
            self._scale(reduced)

        self._engine.reduce(self._index, reduced.device, owners, pack, unpack, defers=defers)

    def _scale(self, reduced: Tensor) -> None:
        """Apply ``set_gradient_divide_factor``, which divides the sum over all ranks."""
        if self._group.sums:
            reduced.mul_(self._engine.session.group.size())

    def drop_kept(self) -> None:
        """Drop the sum of earlier micro-batches, as FSDP drops its own in ``reset_iter_state()``."""
        self._has_kept = False

    def _keep(self, reduced: Tensor) -> None:
        """Add the tensor to those of earlier micro-batches, and leave zeros for FSDP to accumulate."""
        if not self._has_kept:
            if self._kept.shape != reduced.shape or self._kept.dtype != reduced.dtype:
                self._kept = torch.empty_like(reduced)
            self._kept.copy_(reduced)
        else:
            self._kept += reduced
        self._has_kept = True
        reduced.zero_()

    def _follow_weights(self, shards: list[Shard]) -> None:
        moved = [shard.follow() for shard in shards]
        if any(moved):
            self._engine.session.mode.generation += 1  # buffers hold views of the weights
