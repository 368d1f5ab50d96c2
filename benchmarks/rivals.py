"""Other methods of averaging, for simulated workers: fp8, PowerSGD, and local steps.

They follow the descriptions of torch's PowerSGD hook, of `torch.distributed.algorithms.model_averaging`
and of DiLoCo in torchft, without collectives. Local steps keep the moments of Adam on each worker.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from simulation import SimulatedExchange, dense_mean
from torch import Tensor, nn
from torch.optim import Optimizer

from effadam_hook.config import Config
from effadam_hook.modes import GradientMode

__all__ = ["FP8_ROW", "LocalSteps", "PowerSGD", "fp8_mean"]

FP8_ROW = 256
"""Elements that share a scale in fp8."""
_LARGEST_E4M3 = 448.0


def fp8_mean(flats: list[Tensor]) -> None:
    """Average gradients that are sent as e4m3 in both directions, without error feedback."""
    for flat in flats:
        flat.copy_(_as_e4m3(flat))
    dense_mean(flats)
    mean = _as_e4m3(flats[0])
    for flat in flats:
        flat.copy_(mean)


def _as_e4m3(flat: Tensor) -> Tensor:
    rows = nn.functional.pad(flat, (0, -flat.numel() % FP8_ROW)).view(-1, FP8_ROW)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / _LARGEST_E4M3
    return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).view(-1)[: flat.numel()]


class PowerSGD:
    """The average of torch's PowerSGD hook: warm start, error feedback, ten dense steps.

    Args:
        shapes: The shapes of the parameters, in the order of the vector.
        rank: Rank of the approximation.

    Attributes:
        numel: Number of elements that a worker sends in a step after the dense ones.
        errors: ``[numel]``, what each worker has not sent.
    """

    def __init__(self, shapes: Sequence[torch.Size], rank: int) -> None:
        self._slices: list[tuple[slice, torch.Size, Tensor | None]] = []
        generator = torch.Generator().manual_seed(0)
        start = self.numel = 0
        for shape in shapes:
            numel, rows = shape.numel(), shape[0]
            columns = numel // rows
            # torch's rule with its minimal rate of 2.
            q = None
            if (rows + columns) * min(rank, rows, columns) * 2 < numel:
                q = torch.randn(columns, min(rank, rows, columns), generator=generator)
            self.numel += numel if q is None else (rows + columns) * q.shape[1]
            self._slices.append((slice(start, start + numel), torch.Size((rows, columns)), q))
            start += numel
        self.errors: list[Tensor] = []
        self._step = 0

    def __call__(self, flats: list[Tensor]) -> None:
        """Replace the gradients by the approximation of their mean."""
        self._step += 1
        if self._step <= 10:
            dense_mean(flats)
            return
        if not self.errors:
            self.errors = [torch.zeros_like(flat) for flat in flats]
        for flat, error in zip(flats, self.errors, strict=True):
            error.add_(flat)
        means = torch.stack(self.errors).mean(0)
        for place, shape, q in self._slices:
            if q is None:
                for error in self.errors:
                    error[place] = means[place]
                continue
            mean = means[place].view(shape)
            p = torch.linalg.qr(mean @ torch.linalg.qr(q)[0])[0]
            torch.mm(mean.T, p, out=q)  # the mean of all workers' products
            means[place] = (p @ q.T).flatten()
        for flat, error in zip(flats, self.errors, strict=True):
            error.sub_(means)
            flat.copy_(means)


class LocalSteps:
    """Workers that train alone and synchronize after every ``period`` steps.

    Args:
        model: The global model.
        build_optimizer: Makes the optimizer of a worker.
        workers: Number of workers.
        period: H, the number of steps between synchronizations.
        dense_steps: Number of steps with a dense average of gradients at the start.
        outer: Makes the outer optimizer; None to average weights.
        quantizer: Quantizer of the exchanged changes in both directions; empty for none.

    Attributes:
        optimizers: Those of the workers.
        bytes_per_step: Bytes of one worker in the last step, both directions together.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        workers: int,
        period: int,
        dense_steps: int = 0,
        outer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        quantizer: str = "",
    ) -> None:
        self._global = list(model.parameters())
        self._models = [copy.deepcopy(model) for _ in range(workers)]
        self._weights = [list(model.parameters()) for model in self._models]
        self.optimizers = [build_optimizer(weights) for weights in self._weights]
        self._outer = outer(self._global) if outer is not None else None
        self._period, self._dense_steps, self._step = period, dense_steps, 0
        self._dense_bytes = 8 * sum(p.numel() for p in self._global)
        self.bytes_per_step = 0
        self._exchange: SimulatedExchange | None = None
        if quantizer:
            named = list(model.named_parameters())
            config = Config(quantizer, quantizer, topology="rank0")
            modes = [GradientMode()] * workers
            self._exchange = SimulatedExchange([named] * workers, modes, config)

    def step(self, loss_of: Callable[[nn.Module, int], Tensor]) -> float:
        """Make one step of every worker, and synchronize if it is time."""
        total = 0.0
        for worker, (model, optimizer) in enumerate(
            zip(self._models, self.optimizers, strict=True)
        ):
            optimizer.zero_grad()
            loss = loss_of(model, worker)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        is_dense = self._step < self._dense_steps
        if is_dense:
            for gradients in zip(
                *([p.grad for p in weights] for weights in self._weights), strict=True
            ):
                dense_mean(list(gradients))
        for optimizer in self.optimizers:
            optimizer.step()
        self._step += 1
        due = self._step >= self._dense_steps and self._step % self._period == 0
        self.bytes_per_step = self._dense_bytes if is_dense else 0
        if due:
            self._synchronize()
        return total / len(self._models)

    @torch.no_grad()
    def _synchronize(self) -> None:
        self.bytes_per_step = self._dense_bytes
        before = torch.cat([p.flatten() for p in self._global])
        changes = [before - torch.cat([p.flatten() for p in weights]) for weights in self._weights]
        if self._exchange is not None:
            self._exchange.run(changes)
            self.bytes_per_step = self._exchange.bytes_per_step
        else:
            dense_mean(changes)
        parts = changes[0].split([p.numel() for p in self._global])
        for parameter, change in zip(self._global, parts, strict=True):
            if self._outer is None:
                parameter.sub_(change.view_as(parameter))
            else:
                parameter.grad = change.view_as(parameter)
        if self._outer is not None:
            self._outer.step()
        for weights in self._weights:
            for own, parameter in zip(weights, self._global, strict=True):
                own.copy_(parameter)
