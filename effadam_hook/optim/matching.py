"""Matching of the steps of local second moments to those of DDP with AdamW.

Per element, with the mean μ and the noise σ of a worker's gradient and ρ = μ² / (μ² + σ²), the second
moment of one worker is μ² + σ², that of DDP μ² + σ²/N = (ρ + (1-ρ)/N) (μ² + σ²). Steps have the length
of DDP's after a multiplication by ::

    f = 1 / √(ρ + (1-ρ)/N)                                    1 without noise, √N with noise alone

No rank knows DDP's second moment, but all ranks know the decoded mean update δ̃ / α, whose noise
momentum and mean reduce by κ/N, with κ = (1-β1) (1+β1^t) / ((1+β1) (1-β1^t))::

    w = mean of (δ̃/α)² over the elements  ≈  ρ + κ (1-ρ)/N        ρ = (w - κ/N) / (1 - κ/N)

Numerator and denominator are averaged over the steps with β2, as the second moment is. The factor
multiplies the decoded update, and nothing that is sent: it is equal on all ranks. After dense steps the
second moment is that of DDP and becomes local with time. With the share a of dense steps in it, steps
are multiplied by √(a + (1-a) f²).

Few bits with error feedback need less momentum. β1 is multiplied by the part of the energy of a normal
distribution that both quantizers transmit, :attr:`~effadam_hook.wire.quantizers.Quantizer.energy`. This
rule is empirical; see docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effadam_hook.optim.pending import MomentStep

__all__ = ["Matching"]

_SAMPLE = 1 << 16
_UNIT = float(1 << 24)
_LARGEST = 64.0


@dataclass(frozen=True)
class Matching:
    """The correction of the steps of one exchange.

    Attributes:
        workers: N, the number of workers: of nodes, in the hierarchical topology.
        energy: The factor of β1, from 0 to 1.
    """

    workers: int
    energy: float

    def beta1(self, beta1: float) -> float:
        """Return β1 of a compressed step."""
        return beta1 * self.energy

    def first_decay(self, state: dict[str, Any], beta1: float) -> float:
        """Return the product of all β1 so far.

        Args:
            state: The state of the parameter.
            beta1: β1 of the steps that a state without records has made.
        """
        return float(state.get("first_decay", beta1 ** state["step"]))

    def factor(
        self,
        state: dict[str, Any],
        update: Tensor | None,
        moment: MomentStep,
        beta1: float,
        alpha: float,
    ) -> Tensor | None:
        """Return the factor of a step, and follow the energy of the update.

        Args:
            state: The state of the parameter, before the step is recorded in it.
            update: δ̃, in the shape of the parameter; None for a dense step.
            moment: β1 and β2 of the step.
            beta1: β1 of the optimizer.
            alpha: α of the step.

        Returns:
            A float64 tensor without dimensions on the device of the update, computed without waiting
            for the device; None for exactly 1.
        """
        n, beta2 = self.workers, moment.beta2
        first_decay = state["first_decay"] = self.first_decay(state, beta1) * moment.beta1
        dense_mass = state.get("dense_mass", 0.0) * beta2
        state["dense_mass"] = dense_mass + (1 - beta2 if update is None else 0.0)
        if update is None or n == 1 or update.numel() == 0:
            return None
        signal, weight = state.get("signal"), state.get("signal_weight", 0.0)
        if signal is None:
            signal = torch.zeros((), dtype=torch.float64, device=update.device)
            state["signal"] = signal
        mass = 1 - state["decay"] * beta2
        dense = dense_mass / mass if mass > 0 else 0.0
        if alpha > 0:
            energy = _energy(update, alpha)
            if dense > 0 and weight > 0:  # relative to local second moments
                energy = energy * (1 - dense + dense * self._shrinkage(signal, weight))
            kappa = (1 - moment.beta1) / (1 + moment.beta1)
            noise = min(kappa * (1 + first_decay) / (1 - first_decay), 1.0) / n
            signal.mul_(beta2).add_(energy - noise, alpha=1 - beta2)
            state["signal_weight"] = weight = beta2 * weight + (1 - beta2) * (1 - noise)
        if weight == 0:
            return None
        return (dense + (1 - dense) / self._shrinkage(signal, weight)).sqrt()

    def _shrinkage(self, signal: Tensor, weight: float) -> Tensor:
        """Return 1/f²: DDP's second moment relative to that of a worker."""
        rho = (signal / weight).clamp(0, 1)
        return rho + (1 - rho) / self.workers


def _energy(update: Tensor, alpha: float) -> Tensor:
    """Return the mean square of δ̃/α over evenly spaced elements: float64, equal on all ranks."""
    flat = update.detach().flatten()
    sample = flat[:: -(-flat.numel() // _SAMPLE)]
    # Sums of integers have no order, which differs between numbers of threads and processors.
    squares = sample.mul(1 / alpha).square_().nan_to_num_(0.0, _LARGEST).clamp_(max=_LARGEST)
    total = squares.mul_(_UNIT).to(torch.int32).sum(dtype=torch.int64)
    return total.to(torch.float64) / (_UNIT * sample.numel())
