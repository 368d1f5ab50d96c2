"""What goes into a Lightning checkpoint, and what comes back out of it.

Lightning asks every rank for a checkpoint and writes that of rank 0. Residuals differ by rank, so
they are gathered into the one that is written, under a key that plain DDP does not look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from effadam_hook import EfficientAdamState, StateMismatchError

__all__ = ["KEY", "load_states", "saved_states"]

KEY = "effadam_hook"
"""Where a checkpoint holds the states of all ranks, by the name of the model."""


def saved_states(states: Mapping[str, EfficientAdamState]) -> dict[str, Any]:
    """What a checkpoint must hold besides Lightning's own; a collective operation.

    Args:
        states: The states of the models that are saved.

    Returns:
        On rank 0, every rank's states under :data:`KEY`; elsewhere what nobody writes.
    """
    if not states:
        return {}
    return {KEY: {name: state.full_state_dict() for name, state in states.items()}}


def load_states(checkpoint: Mapping[str, Any], states: Mapping[str, EfficientAdamState]) -> None:
    """Continue from the states in a checkpoint, or say that there are none.

    Args:
        checkpoint: What Lightning has read.
        states: The states of the models that are restored, by the names that they were saved under.

    Raises:
        StateMismatchError: If they do not fit.
    """
    if not states:
        return
    saved = checkpoint.get(KEY)
    if saved is None:
        rank_zero_warn(
            "The checkpoint holds no state of the compressed exchange: it was written without this "
            "strategy. Training continues from it, and the residuals start at zero."
        )
        return
    for name, state in states.items():
        if not isinstance(saved, Mapping) or name not in saved:
            held = ", ".join(map(repr, saved)) if isinstance(saved, Mapping) else repr(type(saved))
            raise StateMismatchError(
                f"The checkpoint holds exchange states of {held}, and none of {name!r}. "
                "Load the model under the name under which it was saved."
            )
        state.load_state_dict(saved[name])
