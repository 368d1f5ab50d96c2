"""The part of a parameter's moments that this rank holds.

In flat topologies a rank has the moments of whole parameters. In the hierarchical topology the worker
is the node, and a rank advances the moments of its own share of each parameter: 1/G of the memory, with
G ranks a node. Dense steps need the moments of all elements. The first dense step therefore makes them
whole, and the next compressed step reduces them to the share again::

    compressed steps  ── widen, then average over all ranks ──►  dense steps
    1-D, with "start" ◄───────────── place ────────────────────  in the parameter's shape

The optimizer's ``state_dict()`` is that of one rank, and has the moments of one share if it is saved
between compressed steps: it warns unless the state of the hook, which has all of them, has been saved
after the same step. On a rank with another share it is an error to continue from it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from effadam_hook.errors import EffAdamError, warn_caller
from effadam_hook.feedback.moments import MOMENTS
from effadam_hook.feedback.parameters import shaped_view
from effadam_hook.wire.node_shares import NodeShare

__all__ = ["place", "warn_of_share", "widen"]


def place(
    state: dict[str, Any],
    parameter: Tensor,
    name: str,
    flats: Mapping[str, Tensor],
    share: NodeShare | None,
) -> None:
    """Move the moments of a parameter into slices of a bucket's buffers.

    Args:
        state: The state of the parameter; its moments become views of the slices.
        parameter: The parameter.
        name: Its name.
        flats: ``[numel]`` by key, the slices: of the whole parameter, or of the share.
        share: This rank's share of the parameters; None for all of them.

    Raises:
        EffAdamError: If the state lacks elements of them.
    """
    first, numel = _own(parameter, name, share)
    for key, flat in flats.items():
        flat.copy_(_slice(state, key, parameter, name, first, numel))
        state[key] = shaped_view(flat, parameter) if share is None else flat
    if share is None:
        state.pop("start", None)
    else:
        state["start"] = first


def warn_of_share(states: Iterable[Mapping[str, Any]], share: NodeShare | None) -> None:
    """Warn if a saved optimizer state has the moments of a share only.

    Args:
        states: The states of the parameters.
        share: This rank's share of the parameters; None for all of them.
    """
    if share is not None and any("start" in state for state in states):
        warn_caller(
            "The state_dict() of this EfficientAdam has the moments of one rank's share, "
            f'1/{share.shares} of them: topology="hierarchical" divides moments among the ranks of a '
            "node. Save the state of the hook with it: call full_state_dict() on all ranks before "
            "state_dict() of the optimizer, as in docs/checkpoints.md. Training cannot continue "
            "from this state alone.",
        )


def widen(state: dict[str, Any], parameter: Tensor, name: str, share: NodeShare | None) -> None:
    """Make the moments of a parameter whole, so that their mean over all ranks is that of the nodes.

    Elements of other ranks' shares are zero, and those of the own share are multiplied by the number of
    ranks of a node. Nothing changes if the moments are whole.

    Args:
        state: The state of the parameter.
        parameter: The parameter.
        name: Its name.
        share: This rank's share of the parameters; None for all of them.

    Raises:
        EffAdamError: If the state lacks elements of the share.
    """
    if "start" not in state:
        return
    first, numel = _own(parameter, name, share)
    for key in MOMENTS:
        held = _slice(state, key, parameter, name, first, numel)
        whole = held.new_zeros(parameter.numel())
        torch.mul(held, 1 if share is None else share.shares, out=whole[first : first + numel])
        state[key] = shaped_view(whole, parameter)
    del state["start"]


def _own(parameter: Tensor, name: str, share: NodeShare | None) -> tuple[int, int]:
    """Return the first element and the number of elements of a parameter that this rank advances."""
    return (0, parameter.numel()) if share is None else share.of(name, parameter.numel())


def _slice(
    state: Mapping[str, Any], key: str, parameter: Tensor, name: str, first: int, numel: int
) -> Tensor:
    """Return elements of a moment in the order of DDP's bucket."""
    held: Tensor = state[key]
    start = state.get("start")
    if start is None:
        flat = torch.empty(parameter.numel(), dtype=held.dtype, device=held.device)
        shaped_view(flat, parameter).copy_(held)
        return flat[first : first + numel]
    if numel and not start <= first <= first + numel <= start + held.numel():
        raise EffAdamError(
            f"The optimizer has the moments of the elements {start} to {start + held.numel() - 1} of "
            f"{name!r}, and this rank needs those of {first} to {first + numel - 1}. With "
            'topology="hierarchical" the state_dict() of the optimizer has the moments of one rank\'s '
            "share. Load the state of the hook after it, as full_state_dict() returns it: it has the "
            "moments of all ranks. Without one load no optimizer state: moments then start at zero. "
            "If a model with this optimizer was wrapped anew, pass the state on after attach: "
            "new_state.load_state_dict(old_state.state_dict())."
        )
    begin = first - start if numel else 0
    return held[begin : begin + numel]
