"""States of the exchange in Lightning checkpoints.

Lightning collects a checkpoint on every rank and writes that of rank 0. Residuals differ between ranks,
so they are gathered into the checkpoint of rank 0, under a key that plain DDP ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from effadam_hook import EfficientAdamState, StateMismatchError

__all__ = ["KEY", "load_states", "saved_states"]

KEY = "effadam_hook"
"""Key of the states of all ranks in a checkpoint; they are stored by the name of the model."""


def saved_states(states: Mapping[str, EfficientAdamState]) -> dict[str, Any]:
    """Gather the states for a checkpoint; a collective operation.

    Args:
        states: States of the saved models, by the name of the model.

    Returns:
        On rank 0, the states of all ranks under :data:`KEY`; on other ranks, a value to be ignored.
    """
    if not states:
        return {}
    return {KEY: {name: state.full_state_dict() for name, state in states.items()}}


def load_states(checkpoint: Mapping[str, Any], states: Mapping[str, EfficientAdamState]) -> None:
    """Restore the states from a checkpoint; warn if it contains none.

    Args:
        checkpoint: The checkpoint that Lightning has loaded.
        states: States of the restored models, by the name under which each model was saved.

    Raises:
        StateMismatchError: If a saved state is missing or does not fit.
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
