"""Before anything is exchanged: do all ranks run the same thing?

Ranks that differ in a quantizer or in the order of parameters would decode each other's bytes as
something else and train a wrong model. So each rank describes itself as plain JSON, all descriptions
are gathered, and every rank compares them all and raises the same error if they differ.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import torch
import torch.distributed as dist

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.compat import gather_bytes

__all__ = ["check_agreement"]

_MOST_SHOWN = 5


def check_agreement(
    description: dict[str, Any], group: dist.ProcessGroup, device: torch.device
) -> str:
    """Compare every rank's description; a collective operation.

    Args:
        description: Plain values by name, nested dictionaries and lists included.
        group: The process group.
        device: Where the group's backend wants tensors.

    Returns:
        A word that is the same on all ranks and new each time.

    Raises:
        DisagreementError: On every rank, naming which rank differs from rank 0 in what.
    """
    word = uuid.uuid4().hex
    if group.size() == 1:
        return word
    own = json.dumps(description, sort_keys=True).encode()
    gathered = gather_bytes(word.encode() + own, group, device, everywhere=True)
    texts = [text[len(word) :] for text in gathered]
    if all(text == texts[0] for text in texts):
        return gathered[0][: len(word)].decode()
    first = _flatten(json.loads(texts[0]))
    lines = []
    for rank, text in enumerate(texts):
        other = _flatten(json.loads(text))
        for key in dict.fromkeys((*first, *other)):
            here, there = first.get(key, "absent"), other.get(key, "absent")
            if here != there:
                lines.append(f"{key} is {there!r} on rank {rank} and {here!r} on rank 0")
    more = f"; and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
    raise DisagreementError(
        f"The ranks disagree: {'; '.join(lines[:_MOST_SHOWN])}{more}. "
        "Start every rank with the same model, options and package versions."
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary of dotted keys."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = {str(i): item for i, item in enumerate(value)}.items()
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
