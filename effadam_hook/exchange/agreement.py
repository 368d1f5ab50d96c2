"""The comparison of options, versions, models and steps between all ranks, before the first exchange.

Ranks that differ in a quantizer, or in the order of parameters, would misread each other's payloads
and train a wrong model. Each rank therefore describes itself in JSON. All descriptions are
gathered, and every rank compares all of them and raises the same error if two differ.
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
    """Compare the descriptions of all ranks; a collective operation.

    Args:
        description: Plain values by name, nested dictionaries and lists included; or the exception
            that prevented it, so that the other ranks do not wait for this one.
        group: The process group.
        device: A device whose tensors the group's backend can send.

    Returns:
        A run id: the same on all ranks, and different for every call.

    Raises:
        DisagreementError: On every rank, if a description differs from that of rank 0; the message
            names the rank and the values.
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
    layout: str,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Compare steps, topologies and blocks of all ranks; a collective operation.

    Args:
        run_id: Run id of the model; ranks that open two models in different orders over one group
            meet here.
        steps: Number of steps of the exchange.
        optimizer_steps: Digest of the optimizer's step counts, where the exchange depends on them.
        layout: Topology and block size, which a loaded state may have decided.
        group: The process group.
        device: A device whose tensors the group's backend can send.

    Raises:
        DisagreementError: On every rank, if two differ.
    """
    if group.size() == 1:
        return
    own = json.dumps([steps, optimizer_steps, run_id, layout]).encode()
    rows = [json.loads(text) for text in gather_bytes(own, group, device, everywhere=True)]
    others = [str(rank) for rank, row in enumerate(rows) if row[2] != run_id]
    if others:
        ranks = ", ".join(others)
        raise DisagreementError(
            f"Rank {ranks} opens another model here than rank {group.rank()}. Run the backward "
            "passes of several models in the same order on all ranks, or give each model a process "
            "group of its own where threads run them."
        )
    if message := differing_steps([row[0] for row in rows], [row[1] for row in rows]):
        raise DisagreementError(message)
    other = next((rank for rank, row in enumerate(rows) if row[3] != rows[0][3]), 0)
    if other:
        raise DisagreementError(
            f"The ranks have loaded states of different topologies or blocks: rank {other} "
            f"has {rows[other][3]}, and rank 0 {rows[0][3]}. All ranks must load the state of the same "
            "run, or none of them."
        )


def differing_steps(
    steps: Sequence[int], optimizer_steps: Sequence[int], ranks: Sequence[int] | None = None
) -> str:
    """Describe the ranks whose steps differ from those of the first rank.

    Args:
        steps: Number of steps of the exchange, by rank.
        optimizer_steps: Digests of the optimizer's step counts, by rank.
        ranks: The ranks to compare; None for all ranks of the group.

    Returns:
        A message with the ranks, the rule and the remedy; empty if no rank differs.
    """
    names = range(len(steps)) if ranks is None else ranks
    differences = [
        f"rank {rank} is at step {step} and rank {names[0]} at step {steps[0]}"
        for rank, step in zip(names, steps, strict=True)
        if step != steps[0]
    ]
    if not differences:
        differences = [
            f"the optimizer of rank {rank} counts other steps than that of rank {names[0]}"
            for rank, digest in zip(names, optimizer_steps, strict=True)
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
    """Flatten nested dictionaries and lists into one dictionary with dotted keys."""
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
