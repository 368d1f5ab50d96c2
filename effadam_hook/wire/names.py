"""Canonical parameter names: the same whatever wraps a model or a part of it.

``torch.compile``, checkpoint wrappers, FSDP and DDP insert a component of their own into the dotted
names of ``named_parameters()``. A rule, a saved residual or a message that went by those names would
lose its parameter as soon as a wrapper is put on or taken off. The canonical name is the name without
these components.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

__all__ = ["canonical_name", "canonical_names", "nearest_names"]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Components of torch.compile, of activation checkpointing and of FSDP."""
_DDP = "module"
"""The first component under DDP; anywhere else it may be a module of the model."""


def canonical_name(name: str) -> str:
    """Remove the components that wrappers insert into a parameter's name.

    Args:
        name: A name as ``named_parameters()`` gives it.

    Returns:
        The name without wrapper components; the name itself if nothing else is in it.

    Example:
        >>> canonical_name("module._orig_mod.head._checkpoint_wrapped_module.weight")
        'head.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if len(parts) > 1 and parts[0] == _DDP:
        del parts[0]
    return ".".join(parts) or name


def canonical_names(names: Collection[str]) -> dict[str, str]:
    """Find the canonical names of different parameters of one model.

    Args:
        names: One name for each parameter.

    Returns:
        The canonical name by name. Parameters whose canonical names would be equal keep their own.
    """
    found = {name: canonical_name(name) for name in names}
    counts: dict[str, int] = {}
    for canonical in found.values():
        counts[canonical] = counts.get(canonical, 0) + 1
    unique = {name: other if counts[other] == 1 else name for name, other in found.items()}
    if len(set(unique.values())) < len(unique):  # a name that was kept is another's canonical one
        return {name: name for name in names}
    return unique


def nearest_names(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Find the names that a misspelt pattern may have meant.

    Args:
        pattern: A shell pattern or a name.
        names: The names that exist.
        most: How many to return.

    Returns:
        The nearest names, the best first; empty if none is near.
    """
    literal = pattern.strip("*?.")
    owners: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        for piece in (*prefixes, *parts):
            owners.setdefault(piece, name)
    close = difflib.get_close_matches(literal, owners, n=10 * most, cutoff=0.5)
    return list(dict.fromkeys(owners[piece] for piece in close))[:most]
