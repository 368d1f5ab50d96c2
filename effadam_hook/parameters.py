"""Which parameter a tensor is: its name and its position, stable across buckets and runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from effadam_hook.errors import EffAdamError

__all__ = ["Parameter", "ParameterTable", "flat_view", "shaped_view"]


def flat_view(tensor: Tensor) -> Tensor:
    """A tensor's elements in the order in which DDP lays them out in a bucket.

    That is the order in memory where there are neither gaps nor overlaps, ``channels_last``
    included, and the logical order otherwise.

    Args:
        tensor: Of any shape.

    Returns:
        ``[numel]``, a view where DDP's order is that in memory.
    """
    tensor = tensor.detach()
    if _is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def shaped_view(flat: Tensor, like: Tensor) -> Tensor:
    """A stretch of a bucket in the shape of its parameter; the inverse of :func:`flat_view`.

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
    """Whether some order of the dimensions makes the tensor contiguous."""
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
class Parameter:
    """A parameter's identity.

    Attributes:
        name: Its name in the model, or its position where the model is not known.
        order: Its position among the model's parameters, or in order of appearance.
    """

    name: str
    order: int


class ParameterTable:
    """Finds a parameter's identity by its tensor.

    With the model's names (:meth:`bind`) identities are those of ``named_parameters()``. Without,
    parameters are numbered as DDP first shows them, which is the same on every rank and in every run
    of the same program.
    """

    def __init__(self) -> None:
        self.bound = False
        # By id; holding the tensor keeps its id from being used again.
        self._known: dict[int, tuple[Tensor, Parameter]] = {}

    def first_name(self) -> str:
        """The name of the first parameter; empty where names are not known."""
        if not self.bound:
            return ""
        return next((parameter.name for _, parameter in self._known.values()), "")

    def bind(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take the names of a model.

        Args:
            named: Names and parameters in the model's order.

        Raises:
            EffAdamError: If numbers have been given to parameters already.
        """
        if self._known:
            raise EffAdamError(
                "Cannot take parameter names: this state has already seen parameters. "
                "Bind a state once, before the first backward."
            )
        for name, tensor in named:
            self._add(name, tensor)
        self.bound = True

    def find(self, tensor: Tensor) -> Parameter:
        """The identity of a parameter.

        Args:
            tensor: The parameter itself.

        Returns:
            Its name and order.

        Raises:
            EffAdamError: If it belongs to another model than the one bound.
        """
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        if self.bound:
            raise EffAdamError(
                f"A parameter of shape {tuple(tensor.shape)} is not part of the model that this "
                "state was bound to. Use one state per DDP model."
            )
        return self._add(str(len(self._known)), tensor)

    def order_of(self, name: str) -> int:
        """The position of the parameter of that name."""
        for _, parameter in self._known.values():
            if parameter.name == name:
                return parameter.order
        # Not seen yet: without a model's names, the name is the position.
        return int(name)

    def numels(self) -> dict[str, int]:
        """Number of elements by name."""
        return {parameter.name: tensor.numel() for tensor, parameter in self._known.values()}

    def describe(self) -> dict[str, list[object]]:
        """Position, shape and dtype by name, as plain values, for comparison between ranks."""
        return {
            parameter.name: [parameter.order, str(list(tensor.shape)), str(tensor.dtype)]
            for tensor, parameter in self._known.values()
        }

    def device(self) -> torch.device:
        """Where the parameters are; the CPU before any is known."""
        for tensor, _ in self._known.values():
            return tensor.device
        return torch.device("cpu")

    def _add(self, name: str, tensor: Tensor) -> Parameter:
        parameter = Parameter(name, len(self._known))
        self._known[id(tensor)] = (tensor, parameter)
        return parameter
