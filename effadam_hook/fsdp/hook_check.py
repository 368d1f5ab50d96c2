"""The check that every parameter group of a model still has its hook.

FSDP averages a group without a hook inside the shard mesh only, and replicas would drift apart
without an error. Modules can be sharded or replaced after ``attach``, and hooks be overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from effadam_hook.errors import EffAdamError
from effadam_hook.fsdp.groups import ShardGroup, find_groups, name_shards
from effadam_hook.wire.names import canonical_name

__all__ = ["HookCheck"]


class HookCheck:
    """Compare the groups of a model with those that have hooks, and their hooks at each step.

    Args:
        model: The model.
        groups: Its parameter groups.
        hooks: Their hooks.
        others: Names and values of the parameters that are in no group.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[ShardGroup],
        hooks: Sequence[object],
        others: list[tuple[str, nn.Parameter]],
    ) -> None:
        self._model = model
        self._groups = groups
        self._hooks = hooks
        self._others = _trained_names(others).keys()
        self._has_compared = False

    def __call__(self) -> None:
        """Check the hooks, and at the first call the modules of the model.

        Raises:
            EffAdamError: If a hook was replaced, or a module has come after ``attach``.
        """
        for group, hook in zip(self._groups, self._hooks, strict=True):
            group.check_hook(hook)
        if not self._has_compared:
            self._compare()
            self._has_compared = True

    def _compare(self) -> None:
        groups = find_groups(self._model, trained_only=True)
        new = [repr(each.name or "(root)") for each in groups if not each.is_in(self._groups)]
        if new:
            raise EffAdamError(
                f"{len(new)} modules went through fully_shard after attach, such as {new[0]}: their "
                "gradients would not be averaged over the replicas. Call attach after all calls of "
                "fully_shard."
            )
        # Wrappers of compiling and checkpointing may have come after attach.
        now = _trained_names(name_shards(self._model, groups)[1])
        trained = sorted(now[name] for name in now.keys() - self._others)
        if trained:
            raise EffAdamError(
                f"{len(trained)} trainable parameters were added or unfrozen after attach, such as "
                f"{trained[0]!r}, and are in no module that went through fully_shard: nothing would "
                "average their gradients. Replace modules before fully_shard, and attach last."
            )


def _trained_names(parameters: list[tuple[str, nn.Parameter]]) -> dict[str, str]:
    """Return the names of trainable parameters by the names that they have without wrappers."""
    return {canonical_name(name): name for name, each in parameters if each.requires_grad}
