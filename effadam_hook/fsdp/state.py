"""State of the hook for a model that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from effadam_hook.errors import EffAdamError
from effadam_hook.fsdp.checkpoint import load_checkpoint, restore_shards, save_shards
from effadam_hook.fsdp.engine import ShardEngine
from effadam_hook.fsdp.groups import Shard, ShardGroup
from effadam_hook.state import EfficientAdamState

__all__ = ["ShardedState"]


class ShardedState(EfficientAdamState):
    """State of the hook for a model that FSDP2 shards; made by :func:`effadam_hook.attach`.

    The process group is that of the replicas, and residuals belong to this rank's shards. Saved states
    consist of DTensors, for ``torch.distributed.checkpoint``.

    Example:
        >>> dcp.save({"model": ..., "effadam": state.state_dict()}, checkpoint_id=path)
        >>> state.load_checkpoint(path)
    """

    _engine: ShardEngine
    _groups: tuple[ShardGroup, ...] = ()

    def _make_engine(self, group: dist.ProcessGroup | None) -> ShardEngine:
        return ShardEngine(self.config, group)

    @property
    def engine(self) -> ShardEngine:
        """The backward passes of the model."""
        return self._engine

    def take_groups(self, groups: list[ShardGroup]) -> None:
        """Take the parameter groups of the model; called by :func:`effadam_hook.attach`."""
        self._groups = tuple(groups)

    def close(self) -> None:
        """End the threads of the exchange. The state remains readable and can be saved.

        A later backward raises an error, as nothing would average its gradients over the replicas. The
        model can be attached again.
        """
        super().close()
        self._engine.release()

    def _shards(self) -> dict[str, Shard]:
        find = self.session.parameters.find
        shards = (shard for group in self._groups for shard in group.shards)
        return {find(shard.owner).name: shard for shard in shards}

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals and counters; a collective operation of the replicas.

        The servers' residuals are gathered, which takes as many bytes as one step without compression.

        Returns:
            DTensors with the placements of the parameters, and plain values, for
            ``torch.distributed.checkpoint``. Tensors are copies.
        """
        return save_shards(self.session, self._shards())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state of the same number of replicas and the same shard mesh.

        Args:
            saved: A dictionary of :meth:`state_dict` of this rank.

        Raises:
            StateMismatchError: If it does not fit; the running state is unchanged then.
        """
        restore_shards(self.session, self._shards(), saved)

    def load_checkpoint(self, checkpoint_id: Any, *, key: str = "effadam") -> None:
        """Continue from a checkpoint of any number of replicas and any shard mesh.

        A collective operation of all ranks. On the same number of replicas every replica gets its own
        worker residuals back; on another one, all start with their mean. The servers' residuals are
        divided among the new servers, and counters are those of one saved rank.

        Args:
            checkpoint_id: Folder of a checkpoint of ``torch.distributed.checkpoint``, or its
                ``StorageReader``.
            key: Key of the state in the dictionary that was saved.

        Raises:
            StateMismatchError: If it does not fit; the running state is unchanged then.
        """
        load_checkpoint(self.session, self._shards(), checkpoint_id, key)

    def full_state_dict(self) -> dict[str, Any]:
        """Raise an error: the states of a sharded model are not gathered on one rank.

        Raises:
            EffAdamError: In any case.
        """
        raise EffAdamError(
            "full_state_dict() is not available for a sharded model, whose residuals may not fit one "
            'rank. Save with torch.distributed.checkpoint: dcp.save({"effadam": state.state_dict()}, '
            "checkpoint_id=path), and load with state.load_checkpoint(path)."
        )
