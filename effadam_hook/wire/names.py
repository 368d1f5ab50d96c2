"""Canonical parameter names, which do not depend on the wrappers of a model or of its parts.

``torch.compile``, checkpoint wrappers, FSDP and DDP insert components into the dotted names of
``named_parameters()``. Rules, saved residuals and messages that used those names would lose their
parameters when a wrapper is added or removed. The canonical name is the name without these components.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

__all__ = ["canonical_name", "canonical_names", "nearest_names"]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Components of torch.compile, of activation checkpointing and of FSDP."""
_DDP = "module"
"""First component under DDP. In any other place it may be a module of the model."""


def canonical_name(name: str) -> str:
    """Remove the components that wrappers insert into a parameter's name.

    Args:
        name: A name of ``named_parameters()``.

    Returns:
        The name without wrapper components; the name itself if it has no other component.

    Examples:
        >>> canonical_name("module._orig_mod.head._checkpoint_wrapped_module.weight")
        'head.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if len(parts) > 1 and parts[0] == _DDP:
        del parts[0]
    return ".".join(parts) or name


def canonical_names(names: Collection[str]) -> dict[str, str]:
    """Return the canonical names of the parameters of one model.

    Args:
        names: One name for each parameter.

    Returns:
        The canonical names by name. Parameters whose canonical names would be equal keep their names.
    """
    found = {name: canonical_name(name) for name in names}
    counts: dict[str, int] = {}
    for canonical in found.values():
        counts[canonical] = counts.get(canonical, 0) + 1
    unique = {name: other if counts[other] == 1 else name for name, other in found.items()}
    if len(set(unique.values())) < len(
        unique
    ):  # a kept name is the canonical name of another parameter
        return {name: name for name in names}
    return unique


def nearest_names(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return the names that are nearest to a misspelt pattern.

    Args:
        pattern: A shell pattern or a name.
        names: The valid names.
        most: Maximum number of names to return.

    Returns:
        The nearest names, best first; empty if no name is near.
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
