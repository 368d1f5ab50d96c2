"""Identities of parameters: names that do not depend on buckets, wrappers and runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from effadam_hook.config import Config
from effadam_hook.errors import EffAdamError
from effadam_hook.wire.names import canonical_name, canonical_names

__all__ = [
    "ParameterIdentity",
    "ParameterTable",
    "flat_view",
    "identify",
    "is_exchanged",
    "shaped_view",
    "whole_numel",
]


def flat_view(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor in the order that DDP uses in a bucket.

    This is the order in memory for tensors without gaps and overlaps, ``channels_last`` included, and
    the logical order otherwise.

    Args:
        tensor: Tensor of any shape.

    Returns:
        ``[numel]``, a view if DDP uses the order in memory.
    """
    tensor = tensor.detach()
    if _is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def shaped_view(flat: Tensor, like: Tensor) -> Tensor:
    """Return a slice of a bucket in the shape of its parameter; the inverse of :func:`flat_view`.

    Args:
        flat: ``[numel]``.
        like: The parameter.

    Returns:
        A view of ``flat`` with the parameter's shape, and its strides if it is dense.
    """
    if _is_dense(like):
        return flat.as_strided(like.size(), like.stride(), flat.storage_offset())
    return flat.view(like.shape)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether some order of the dimensions makes the tensor contiguous."""
    if tensor.numel() == 0:
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@dataclass(frozen=True)
class ParameterIdentity:
    """Identity of a parameter.

    Attributes:
        name: Canonical name in the model, or a number if the model is not known.
        aliases: All names: canonical names and those of ``named_parameters()``. A tied parameter has
            several of each.
    """

    name: str
    aliases: tuple[str, ...]


def identify(named: Iterable[tuple[str, Tensor]]) -> list[tuple[ParameterIdentity, Tensor]]:
    """Return the identities of the parameters of a model.

    Args:
        named: Names and parameters in the order of the model, as
            ``named_parameters(remove_duplicate=False)`` returns them. A tied parameter occurs once
            under each of its names; the first name is its identity.

    Returns:
        Identities and parameters in the same order, each parameter once.
    """
    tensors: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    canonical = canonical_names([own[0] for own in names.values()])
    identities = []
    for key, own in names.items():
        name = canonical[own[0]]
        aliases = dict.fromkeys([name, *own, *map(canonical_name, own)])
        identities.append((ParameterIdentity(name, tuple(aliases)), tensors[key]))
    return identities


class ParameterTable:
    """Identities of parameters by tensor.

    With the names of the model (:meth:`bind`) identities are canonical names, see
    :mod:`effadam_hook.wire.names`. Without them, parameters are numbered in the order of their first
    buckets, which is equal on all ranks and in all runs of the same program.
    """

    def __init__(self) -> None:
        self.bound = False
        # By id; a reference to the tensor prevents that its id is used again.
        self._known: dict[int, tuple[Tensor, ParameterIdentity]] = {}
        self._names: dict[str, str] = {}

    def first_name(self) -> str:
        """Return the name of the first parameter; empty if names are not known."""
        if not self.bound:
            return ""
        return next((parameter.name for _, parameter in self._known.values()), "")

    def bind(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take the names of a model.

        Args:
            named: Names and parameters that DDP may exchange, as for :func:`identify`.

        Raises:
            EffAdamError: If parameters have been numbered already.
            ValueError: If two parameters have the same name.
        """
        if self._known:
            raise EffAdamError(
                "Cannot take parameter names: this state has already seen parameters. "
                "Bind a state once, before the first backward."
            )
        owners: dict[str, set[str]] = {}
        identities = identify(named)
        names = {parameter.name for parameter, _ in identities}
        if len(names) < len(identities):
            raise ValueError(
                f"Invalid named_parameters: {len(identities)} parameters with {len(names)} different "
                "names. Must be those of one model: model.named_parameters(remove_duplicate=False)."
            )
        for parameter, tensor in identities:
            self._known[id(tensor)] = (tensor, parameter)
            for alias in parameter.aliases:
                owners.setdefault(alias, set()).add(parameter.name)
        self._names = {alias: min(named) for alias, named in owners.items() if len(named) == 1}
        self._names.update(zip(names, names, strict=True))
        self.bound = True

    def find(self, tensor: Tensor) -> ParameterIdentity:
        """Return the identity of a parameter.

        Args:
            tensor: The parameter.

        Raises:
            EffAdamError: If it belongs to another model than the bound one.
        """
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        if self.bound:
            raise EffAdamError(
                f"A parameter of shape {tuple(tensor.shape)} is not part of the model that this "
                "state was bound to. Use one state per DDP model."
            )
        number = str(len(self._known))
        self._known[id(tensor)] = (tensor, ParameterIdentity(number, (number,)))
        return self._known[id(tensor)][1]

    def resolve(self, name: str) -> str:
        """Translate a saved name into the name in this model.

        Args:
            name: Name in a saved state: canonical, with wrapper components, or any name of a tied
                parameter.

        Returns:
            The name of the parameter in this model; ``name`` if there is no such parameter.
        """
        return self._names.get(name) or self._names.get(canonical_name(name), name)

    def aliases(self) -> list[str]:
        """Return all names of all parameters."""
        return [alias for _, parameter in self._known.values() for alias in parameter.aliases]

    def numels(self) -> dict[str, int]:
        """Return the number of elements by name."""
        return {parameter.name: tensor.numel() for tensor, parameter in self._known.values()}

    def exact(self, config: Config) -> frozenset[str]:
        """Return the names of the exchanged parameters that a rule of ``exact`` selects.

        Args:
            config: The options.
        """
        return frozenset(
            parameter.name
            for tensor, parameter in self._exchanged()
            if config.is_exact(parameter.aliases, tensor.ndim, whole_numel(tensor))
        )

    def quantized_1d(self, config: Config) -> list[str]:
        """Return the parameters of at most one dimension that no rule of ``exact`` selects.

        Args:
            config: The options.

        Returns:
            Names of exchanged parameters.
        """
        return [
            parameter.name
            for tensor, parameter in self._exchanged()
            if tensor.ndim <= 1
            and not config.is_exact(parameter.aliases, tensor.ndim, whole_numel(tensor))
        ]

    def rows(self, config: Config) -> list[tuple[int, int]]:
        """Return the length of a row, and the number of elements, of the quantized matrices.

        Args:
            config: The options.

        Returns:
            One pair for each exchanged parameter of two or more dimensions that no rule of ``exact``
            selects. A row consists of the elements with one index of the first dimension; of the
            slowest one in memory, which is the order of a bucket.
        """
        return [
            (_row_numel(tensor), whole_numel(tensor))
            for tensor, parameter in self._exchanged()
            if tensor.ndim > 1
            and not config.is_exact(parameter.aliases, tensor.ndim, whole_numel(tensor))
        ]

    def describe(self) -> dict[str, list[object]]:
        """Return position, shape and dtype by name, as plain values, for comparison between ranks.

        Only trainable parameters are included: DDP does not exchange the others, and ranks may differ
        in them.
        """
        return {
            parameter.name: [position, str(list(tensor.shape)), str(tensor.dtype)]
            for position, (tensor, parameter) in enumerate(self._exchanged())
        }

    def device(self) -> torch.device:
        """Return the device of the parameters; the CPU before any is known."""
        for tensor, _ in self._exchanged():
            return tensor.device
        return torch.device("cpu")

    def _exchanged(self) -> list[tuple[Tensor, ParameterIdentity]]:
        """Return the parameters that DDP exchanges; without names, those of all buckets so far."""
        known = self._known.values()
        return [entry for entry in known if not self.bound or is_exchanged(entry[0])]


def is_exchanged(parameter: Tensor) -> bool:
    """Return whether a parameter is trainable and not marked as one that DDP ignores."""
    return parameter.requires_grad and not getattr(parameter, "_ddp_ignored", False)


def _row_numel(tensor: Tensor) -> int:
    shape = tensor.shape
    slowest = 0
    if _is_dense(tensor):
        slowest = max(range(len(shape)), key=lambda dim: (shape[dim] > 1, tensor.stride(dim)))
    return max(1, math.prod(size for dim, size in enumerate(shape) if dim != slowest))


def whole_numel(tensor: Tensor) -> int:
    """Return the number of elements of a parameter of which a tensor may be one rank's shard."""
    numel: int = getattr(tensor, "whole_numel", tensor.numel())
    return numel
