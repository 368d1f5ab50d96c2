"""Operations that the kernels fuse with the quantizer.

The kernels quantize ``x + residual``. Two further operations can run in the same pass:

- A :class:`Preconditioner` divides the blocks of a parameter by the root of its second moment before
  they are quantized, and multiplies them by it after decoding. Elements with small and with large
  gradients then share a scale evenly. Payloads are in preconditioned units, residuals in gradient
  units. The second moments must be equal on all ranks.
- An :class:`AdamSource` turns the gradient into an Adam update, which is quantized in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ADAM_TERMS", "AdamSource", "Preconditioner"]

ADAM_TERMS = ("beta1", "1-beta1", "beta2", "1-beta2", "step_size", "inv_sqrt_correction2", "eps")
"""Columns of :attr:`AdamSource.terms`."""


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """Second moments by which blocks are divided, one per slot of the bucket.

    A block of the gradient ``g`` with the second moments ``v`` is quantized as ``g / d`` where
    ``d = sqrt(v + mean(v) / 1000)``. The floor ``mean(v) / 1000`` prevents elements with a tiny ``v``
    from determining the scale. If the floor is not a positive, normal, finite number, ``d = 1``. Raw
    pieces are not preconditioned.

    Attributes:
        second_moments: ``[parameter numel]`` each, contiguous, in the dtype of the arithmetic, on the
            bucket's device; None leaves the blocks of a slot unchanged.
    """

    second_moments: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class AdamSource:
    """Moments that turn a gradient ``g`` into the update ``u`` that is quantized.

    With the terms of the slot::

        v = v * beta2 + (g * g) * (1 - beta2)
        m = m * beta1 + g * (1 - beta1)
        u = (m * step_size) / (sqrt(v) * inv_sqrt_correction2 + eps)

    with ``u = 0`` where numerator and denominator are 0. A block in which ``v`` or ``u + residual`` is
    not finite is sent as NaN, and its ``m``, ``v`` and residual remain unchanged; in a raw piece this
    applies to each element.

    Attributes:
        exp_avg: ``[numel]``, ``m`` in the order of the bucket and the dtype of the arithmetic, updated
            in place.
        exp_avg_sq: ``[numel]``, ``v``, likewise.
        terms: ``[slots, 7]`` float64 on the CPU, contiguous, with the columns :data:`ADAM_TERMS`.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    terms: Tensor
