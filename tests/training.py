"""Training for the multi-rank tests: small models of odd sizes, with gradients that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdamState, attach

# Odd on purpose: partial blocks, single elements, parameters below one block, several buckets.
SHAPES = ((37, 53), (53,), (1,), (301, 11), (7, 3, 5), (2, 259), (513,), (64, 40))


class ChosenGradients(nn.Module):
    """Parameters whose gradients are exactly what the caller hands in.

    Args:
        shapes: One parameter each.
        dtype: Of all of them.
    """

    def __init__(
        self, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """The sum of weight times gradient, whose gradient is the latter."""
        products = [(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(products).sum()


def drawn_gradients(
    rank: int, step: int, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: Any = torch.float32
) -> list[Tensor]:
    """Gradients that every process can draw for every rank and step.

    They have a mean common to all ranks, differing magnitudes between parameters, and grow and
    shrink over the steps.
    """
    common = torch.Generator().manual_seed(1000 + step)
    own = torch.Generator().manual_seed(7919 * (rank + 1) + step)
    gradients = []
    for index, shape in enumerate(shapes):
        mean = torch.randn(shape, generator=common, dtype=torch.float64)
        noise = torch.randn(shape, generator=own, dtype=torch.float64)
        size = 10.0 ** (-index) * (1.5 + torch.sin(torch.tensor(0.3 * step)).item())
        gradients.append(((mean + noise) * size).to(dtype))
    return gradients


def mean_of(step: int, world_size: int) -> list[Tensor]:
    """The mean over the ranks of what :func:`drawn_gradients` hands out at a step."""
    every = [drawn_gradients(rank, step) for rank in range(world_size)]
    return [sum(g / world_size for g in of_one) for of_one in zip(*every, strict=True)]


def gradients_of(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    """Return the gradients that a :class:`ChosenGradients` model gets from a step's drawn gradients."""
    model.zero_grad()
    model(drawn_gradients(rank, step)).backward()
    return [p.grad.clone() for p in model.parameters()]


def close(got: list[Tensor], want: list[Tensor]) -> bool:
    """Return whether tensors are equal to a millionth of the largest element."""
    return all(
        bool((a - b).abs().max() <= 1e-6 * b.abs().max()) for a, b in zip(got, want, strict=True)
    )


def ddp(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """The module in DDP with buckets of about 4 kB, so that small models have several."""
    return DistributedDataParallel(module, **{"bucket_cap_mb": 0.004, **options})


def train_mlp(
    rank: int,
    world_size: int,
    steps: int,
    hook_options: dict[str, Any],
    ddp_options: dict[str, Any] | None = None,
    learn: Callable[[DistributedDataParallel, EfficientAdamState, Tensor], None] | None = None,
) -> tuple[list[Tensor], EfficientAdamState]:
    """Train a small network with Adam on random data that differs by rank.

    Returns:
        Its weights and the state.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(23, 61), nn.Tanh(), nn.Linear(61, 67), nn.Tanh()),
        *(nn.Linear(67, 43), nn.Tanh(), nn.Linear(43, 5)),
    )
    wrapped = ddp(model, **(ddp_options or {}))
    state = attach(wrapped, **hook_options)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(rank + 1)
    for _ in range(steps):
        batch = torch.randn(8, 23, generator=data)
        optimizer.zero_grad()
        if learn is None:
            loss_of(wrapped, batch).backward()
        else:
            learn(wrapped, state, batch)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], state


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Distance to a fixed function of the input."""
    output: Tensor = model(batch)
    return (output - batch[:, : output.shape[1]].abs()).square().mean()
