"""What the benchmarks train: a perceptron that computes, and one that only takes its time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """A perceptron of equal square layers with ReLU, on random rows, with a squared loss.

    Attributes:
        layers: Number of layers.
        width: Rows and columns of each.
        rows: Rows of input on every rank.
        sleep_ms: If not negative, nothing is computed: forward and backward together take this long,
            asleep, and the gradients are the same random numbers every time. So the time of a step
            does not depend on how many ranks share the machine's cores.
    """

    layers: int = 6
    width: int = 1024
    rows: int = 32
    sleep_ms: float = -1.0

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return self.layers * (self.width * self.width + self.width)

    def model(self) -> nn.Module:
        """The bare model, the same on every rank."""
        torch.manual_seed(0)
        if self.sleep_ms >= 0:
            seconds = self.sleep_ms / 1000 / self.layers
            stack: list[nn.Module] = [_Asleep(self.width, seconds) for _ in range(self.layers)]
        else:
            stack = []
            for _ in range(self.layers):
                stack += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*stack)

    def batch(self, rank: int) -> Tensor:
        """A rank's rows."""
        generator = torch.Generator().manual_seed(1 + rank)
        return torch.randn(self.rows, self.width, generator=generator, requires_grad=True)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The loss of a batch."""
        out: Tensor = model(batch)
        return out.square().mean()


class _Asleep(nn.Module):
    """A layer with a linear layer's parameters, which sleeps a third forward and the rest backward."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * 0.01)
        self.bias = nn.Parameter(torch.zeros(width))
        self.seconds = seconds
        self.gradients = (torch.randn(width, width), torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Sleep.apply(x, self.weight, self.bias, self.seconds, self.gradients)
        return out


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seconds: float, gradients: Any
    ) -> Tensor:
        ctx.seconds, ctx.gradients = seconds, gradients
        time.sleep(seconds / 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        time.sleep(ctx.seconds * 2 / 3)
        return grads[0], *ctx.gradients, None, None
