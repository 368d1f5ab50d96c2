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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effadam_hook.kernels.upload import upload
from effadam_hook.optim.pending import MomentStep

__all__ = ["MatchedStep", "Matching"]

_SAMPLES = 4096
_UNIT = float(1 << 24)
_LARGEST = 64.0


class MatchedStep(NamedTuple):
    """The compressed step of one parameter.

    Attributes:
        state: The state of the parameter, after :meth:`Matching.record`.
        update: δ̃, in the shape of the parameter, without gaps in memory.
        moment: β1 and β2 of the step.
        alpha: α of the step.
    """

    state: dict[str, Any]
    update: Tensor
    moment: MomentStep
    alpha: float


class Matching:
    """The correction of the steps of one exchange.

    Args:
        workers: N, the number of workers: of nodes, in the hierarchical topology.
        energy: The factor of β1, from 0 to 1.
    """

    def __init__(self, workers: int, energy: float) -> None:
        self.workers = workers
        self._energy = energy
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def beta1(self, beta1: float) -> float:
        """Return β1 of a compressed step."""
        return beta1 * self._energy

    def first_decay(self, state: dict[str, Any], beta1: float) -> float:
        """Return the product of all β1 so far.

        Args:
            state: The state of the parameter.
            beta1: β1 of the steps that a state without records has made.
        """
        return float(state.get("first_decay", beta1 ** state["step"]))

    def record(self, state: dict[str, Any], moment: MomentStep, beta1: float, dense: bool) -> None:
        """Record a step in the state of a parameter, before its step count changes.

        Args:
            state: The state.
            moment: β1 and β2 of the step.
            beta1: β1 of the optimizer.
            dense: Whether the step is one on the mean gradient.
        """
        state["first_decay"] = self.first_decay(state, beta1) * moment.beta1
        added = 1 - moment.beta2 if dense else 0.0
        state["dense_mass"] = state.get("dense_mass", 0.0) * moment.beta2 + added

    def factors(self, steps: Sequence[MatchedStep]) -> list[Tensor | None]:
        """Return the factors of steps, and follow the energy of the updates.

        The device computes them in a number of calls that does not depend on that of the parameters,
        and the host does not wait for it.

        Args:
            steps: The compressed steps, of different parameters.

        Returns:
            By step, a tensor without dimensions in the dtype and on the device of the update; None for
            exactly 1, with one worker.
        """
        factors: list[Tensor | None] = [None] * len(steps)
        if self.workers == 1:
            return factors
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, step in enumerate(steps):
            kinds.setdefault((step.update.device, step.update.dtype), []).append(index)
        for indices in kinds.values():
            found = self._factors([steps[index] for index in indices])
            for index, factor in zip(indices, found.unbind(), strict=True):
                factors[index] = factor
        return factors

    def _factors(self, steps: Sequence[MatchedStep]) -> Tensor:
        """Return the factors ``[steps]`` of steps on one device, in one dtype."""
        device, dtype = steps[0].update.device, steps[0].update.dtype
        terms = torch.tensor(
            [self._terms(step) for step in steps], dtype=torch.float64, device="cpu"
        )
        scale, last, kept, added, noise, dense, weight = upload(terms, device).T
        energy = self._energies(steps, scale.to(dtype))
        for step in steps:
            if "signal" not in step.state:
                step.state["signal"] = torch.zeros((), dtype=torch.float64, device=device)
        signals = [step.state["signal"] for step in steps]
        signal = torch.stack(signals)
        # Updates after dense steps are relative to the second moment of those.
        relative = torch.where(last > 0, 1 - dense + dense * self._shrinkage(signal / last), 1.0)
        signal.mul_(kept).add_(energy.mul_(relative).sub_(noise).mul_(added))
        torch._foreach_copy_(signals, list(signal.unbind()))
        factor: Tensor = dense + (1 - dense) / self._shrinkage(signal / weight)
        return factor.sqrt_().to(dtype)

    def _terms(self, step: MatchedStep) -> tuple[float, ...]:
        """Return the numbers of a step, and record the weight of the energies in its state.

        Returns:
            1/α, the weight of the energies so far, the factors of their mean and of the next of them,
            κ/N, the share of dense steps in the second moment, the weight with this step.
        """
        state, (beta1, beta2, _), alpha = step.state, step.moment, step.alpha
        mass = 1 - state["decay"] * beta2
        dense = state["dense_mass"] / mass if mass > 0 else 0.0
        last = state.get("signal_weight", 0.0)
        if alpha == 0:  # no update tells its energy; the factor is 1 before the first that does
            return (0.0, last, 1.0, 0.0, 0.0, dense if last else 1.0, last or 1.0)
        first_decay = state["first_decay"]
        kappa = (1 - beta1) * (1 + first_decay) / ((1 + beta1) * (1 - first_decay))
        noise = min(kappa, 1.0) / self.workers
        weight = state["signal_weight"] = beta2 * last + (1 - beta2) * (1 - noise)
        return (1 / alpha, last, beta2, 1 - beta2, noise, dense, weight)

    def _energies(self, steps: Sequence[MatchedStep], scale: Tensor) -> Tensor:
        """Return the mean squares ``[steps]`` of δ̃/α over evenly spaced elements, equal on all ranks.

        Args:
            steps: The steps.
            scale: 1/α by step.
        """
        pieces, counts = [], []
        for step in steps:
            update = step.update
            spacing = -(-update.numel() // _SAMPLES) | 1  # odd: rows usually have even lengths
            counts.append(-(-update.numel() // spacing))
            pieces.append(update.as_strided((counts[-1],), (spacing,), update.storage_offset()))
        width = max(counts)
        samples, zeros = self._buffer(len(steps) * width, scale)
        padded = [each for p, n in zip(pieces, counts, strict=True) for each in (p, zeros[n:width])]
        torch.cat(padded, out=samples)
        samples = samples.view(len(steps), width)
        squares = samples.mul_(scale[:, None]).square_().nan_to_num_(0.0, _LARGEST)
        # Sums of integers have no order, which differs between numbers of threads and processors.
        total = squares.clamp_(max=_LARGEST).mul_(_UNIT).floor_().sum(1, dtype=torch.float64)
        divisors = torch.tensor(counts, dtype=torch.float64, device="cpu").clamp_(min=1).mul_(_UNIT)
        return total.div_(upload(divisors, scale.device)).clamp_(max=1.0)

    def _buffer(self, numel: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a buffer ``[numel]``, which remains between steps, and zeros for the longest row."""
        key = like.device, like.dtype
        if key not in self._buffers or self._buffers[key].numel() < numel + _SAMPLES:
            self._buffers[key] = like.new_zeros(numel + _SAMPLES)
        return self._buffers[key][_SAMPLES : _SAMPLES + numel], self._buffers[key][:_SAMPLES]

    def _shrinkage(self, rho: Tensor) -> Tensor:
        """Return 1/f²: DDP's second moment relative to that of a worker."""
        rho = rho.clamp(0, 1)
        return rho + (1 - rho) / self.workers
