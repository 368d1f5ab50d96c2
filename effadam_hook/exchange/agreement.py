"""Before anything is exchanged: do all ranks run the same thing?

Ranks that differ in a quantizer or in the order of parameters would decode each other's bytes as
something else and train a wrong model. So each rank describes itself as plain JSON, all descriptions
are gathered, and every rank compares them all and raises the same error if they differ.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.waiting import gather_bytes, phase

__all__ = ["check_agreement", "check_steps", "differing_steps"]

_MOST_SHOWN = 5
_FAILED = "failed"


def check_agreement(
    description: dict[str, Any] | Exception, group: dist.ProcessGroup, device: torch.device
) -> str:
    """Compare every rank's description; a collective operation.

    Args:
        description: Plain values by name, nested dictionaries and lists included; or why this rank has
            none, so that the others do not wait for it.
        group: The process group.
        device: Where the group's backend wants tensors.

    Returns:
        A run id that is the same on all ranks and new each time.

    Raises:
        DisagreementError: On every rank, naming which rank differs from rank 0 in what.
    """
    run_id = uuid.uuid4().hex
    if isinstance(description, Exception):
        description = {_FAILED: f"{type(description).__name__}: {description}"}
    if group.size() == 1:
        return run_id
    own = json.dumps(description, sort_keys=True).encode()
    with phase(group.rank(), "comparing options"):
        gathered = gather_bytes(run_id.encode() + own, group, device, everywhere=True)
    texts = [text[len(run_id) :] for text in gathered]
    if all(text == texts[0] for text in texts):
        return gathered[0][: len(run_id)].decode()
    failed = {rank: json.loads(text).get(_FAILED) for rank, text in enumerate(texts)}
    if any(failed.values()):
        said = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items() if text)
        raise DisagreementError(
            f"Ranks have failed before options were compared: {said}. See their output, and restart "
            "all ranks."
        )
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


def check_steps(
    run_id: str,
    steps: int,
    optimizer_steps: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Compare how far every rank has come; a collective operation.

    Args:
        run_id: Of the model; ranks that open two models in different orders meet here over one group.
        steps: Of the exchange.
        optimizer_steps: A digest of those of the optimizer, where the exchange depends on them.
        group: The process group.
        device: Where the group's backend wants tensors.

    Raises:
        DisagreementError: On every rank, if two differ.
    """
    if group.size() == 1:
        return
    own = json.dumps([steps, optimizer_steps, run_id]).encode()
    rows = [json.loads(text) for text in gather_bytes(own, group, device, everywhere=True)]
    others = [str(rank) for rank, row in enumerate(rows) if row[2] != run_id]
    if others:
        ranks = ", ".join(others)
        raise DisagreementError(
            f"Rank {ranks} has come here with another model than rank {group.rank()}. Run the backward "
            "passes of several models in the same order on all ranks, or give each model a process "
            "group of its own where threads run them."
        )
    if message := differing_steps([row[0] for row in rows], [row[1] for row in rows]):
        raise DisagreementError(message)


def differing_steps(steps: Sequence[int], optimizer_steps: Sequence[int]) -> str:
    """A message about ranks that count other steps than rank 0, or nothing.

    Args:
        steps: Of the exchange, by rank.
        optimizer_steps: Digests of those of the optimizer, by rank.

    Returns:
        Who differs, the rule, and the remedy.
    """
    differences = [
        f"rank {rank} is at step {step} and rank 0 at step {steps[0]}"
        for rank, step in enumerate(steps)
        if step != steps[0]
    ]
    if not differences:
        differences = [
            f"the optimizer of rank {rank} counts other steps than that of rank 0"
            for rank, digest in enumerate(optimizer_steps)
            if digest != optimizer_steps[0]
        ]
    if not differences:
        return ""
    more = f"; and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
    return (
        f"The ranks continue from different states: {'; '.join(differences[:_MOST_SHOWN])}{more}. "
        "All ranks must load the state of the same step, or none of them."
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
