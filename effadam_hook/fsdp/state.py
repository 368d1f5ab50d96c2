"""State of the hook for a model that FSDP2 shards."""

from __future__ import annotations

import torch.distributed as dist

from effadam_hook.fsdp.engine import ShardEngine
from effadam_hook.state import EfficientAdamState

__all__ = ["ShardedState"]


class ShardedState(EfficientAdamState):
    """State of the hook for a model that FSDP2 shards; made by :func:`effadam_hook.attach`.

    Residuals belong to this rank's shards.
    """

    _engine: ShardEngine

    def _make_engine(self, group: dist.ProcessGroup | None) -> ShardEngine:
        return ShardEngine(self.config, group)

    @property
    def engine(self) -> ShardEngine:
        """The backward passes of the model."""
        return self._engine
