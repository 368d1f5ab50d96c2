"""The bound on the norm of a node's mean gradient, over all buckets of a step.

A worker's gradient is bounded before it is encoded. In the hierarchical topology the worker is the
node, and each of its ranks has the mean of its share of every bucket. No bucket is encoded before the
ranks have added up the squares of all shares::

    bucket 0    pack ─ node mean ─ average ─┐                             ┌─► encode ─ uplink ─ ...
    bucket 1    pack ─ node mean ─ average ─┴─► sum of squares ─► scale ──┴─► encode ─ uplink ─ ...
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NodeBound"]

_TINY = 1e-6
"""Added to the norm, as :func:`torch.nn.utils.clip_grad_norm_` does."""


class NodeBound:
    """The bound for one step.

    Args:
        most: Largest 2-norm of the node's mean gradient.
        buckets: Number of buckets of the step.
    """

    def __init__(self, most: float, buckets: int) -> None:
        self._most = most
        self._buckets = buckets
        self._held: list[tuple[Tensor, Callable[[], None]]] = []

    def hold(self, values: Tensor, proceed: Callable[[], None]) -> bool:
        """Hold a bucket whose mean is known.

        Args:
            values: ``[share numel]``, this rank's share of the mean, scaled by :meth:`scale`.
            proceed: Continues with the bucket; called by :meth:`proceed`.

        Returns:
            Whether it is the last bucket of the step.
        """
        self._held.append((values, proceed))
        return len(self._held) == self._buckets

    def square(self) -> Tensor:
        """Return the sum of squares of this rank's shares, to be added up over the node.

        Returns:
            ``[1]`` float64.
        """
        norms = [torch.linalg.vector_norm(v, dtype=torch.float64) for v, _ in self._held]
        return torch.stack(norms).square().sum(0, keepdim=True)

    def scale(self, square: Tensor) -> None:
        """Scale all shares, so that the bound holds.

        Args:
            square: ``[1]`` float64, the sum of squares of the node's mean.
        """
        factor = (self._most / (square.sqrt() + _TINY)).clamp(max=1.0)
        for values, _ in self._held:
            values.mul_(factor.to(values.dtype))

    def proceed(self) -> None:
        """Continue with all buckets, in their order."""
        held, self._held = self._held, []
        for _, proceed in held:
            proceed()
