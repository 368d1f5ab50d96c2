"""Training tasks: a perceptron that computes, one that sleeps instead, or a user's model."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effadam_hook.errors import CommandError, UserCodeError
from effadam_hook.planner.traffic import ParameterSize

__all__ = ["TrainingTask", "UserModel", "Workload", "describe", "parse_count", "to_device"]

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


class TrainingTask(Protocol):
    """A model, its batches and its loss."""

    def model(self) -> nn.Module:
        """Make the bare model, equal on every rank."""
        ...

    def batch(self, rank: int) -> Any:
        """Make a rank's batch."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of a batch with the wrapped model."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Run backward from the loss."""
        ...


@dataclass(frozen=True)
class Workload:
    """Perceptron of equal square layers with ReLU, on random rows, with a squared loss.

    Attributes:
        layers: Number of layers.
        width: Rows and columns of each layer.
        rows: Rows of input on every rank.
        sleep_ms: If not negative, forward and backward sleep for this time in total instead of
            computing, and the gradients are the same random numbers in every step. The step time then
            does not depend on how many ranks share the machine's cores.
    """

    layers: int = 6
    width: int = 1024
    rows: int = 32
    sleep_ms: float = -1.0

    @property
    def numel(self) -> int:
        """Return the number of parameters."""
        return self.layers * (self.width * self.width + self.width)

    def model(self) -> nn.Module:
        """Make the bare model, equal on every rank."""
        torch.manual_seed(0)
        if self.sleep_ms >= 0:
            seconds = self.sleep_ms / 1000 / self.layers
            stack: list[nn.Module] = [
                _SleepingLayer(self.width, seconds) for _ in range(self.layers)
            ]
        else:
            stack = []
            for _ in range(self.layers):
                stack += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*stack)

    def batch(self, rank: int) -> Tensor:
        """Make a rank's rows of input."""
        generator = torch.Generator().manual_seed(1 + rank)
        return torch.randn(self.rows, self.width, generator=generator, requires_grad=True)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Compute the loss of a batch."""
        out: Tensor = model(batch)
        return out.square().mean()

    def backward(self, loss: Tensor) -> None:
        """Run backward from the loss."""
        loss.backward()  # type: ignore[no-untyped-call]


class _SleepingLayer(nn.Module):
    """Linear layer's parameters without its arithmetic: sleeps 1/3 in forward, 2/3 in backward."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * 0.01)
        self.bias = nn.Parameter(torch.zeros(width))
        self.seconds = seconds
        self.gradients = (torch.randn(width, width), torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Sleep.apply(x, self.weight, self.bias, self.seconds, self.gradients)  # type: ignore[no-untyped-call]
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


class UserModel:
    """Model of a user, named as ``module:function``.

    The function takes no arguments. It returns the model; or the model and a function that computes the
    loss from the wrapped model; or the model and a batch, in which case the loss is the mean of the
    output. Output of the user's code is written to standard error. Its exceptions are raised as
    :class:`~effadam_hook.errors.UserCodeError`.

    Args:
        spec: Name of the function.

    Raises:
        CommandError: If the function does not exist, returns something else, or returns a model without
            trainable parameters.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._make = _look_up(spec)
        self._rest: Any = None

    def model(self) -> nn.Module:
        """Make the bare model, equal on every rank: the function runs with seed 0."""
        torch.manual_seed(0)
        with _user_code(self._spec):
            made = self._make()
        if isinstance(made, nn.Module):
            made = (made, None)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
            raise CommandError(
                f"{self._spec} returned a {type(made).__name__}. It must return an nn.Module, or a "
                "tuple of an nn.Module and a loss function or a batch."
            )
        model: nn.Module = made[0]
        if not describe(model):
            raise CommandError(
                f"The model of {self._spec} has no trainable parameters, so there is nothing to "
                "average. At least one parameter must have requires_grad=True: return the model as it "
                "is trained."
            )
        self._rest = made[1]
        return model

    @property
    def can_step(self) -> bool:
        """Return whether the function supplied a loss or a batch; valid after :meth:`model`."""
        return self._rest is not None

    def batch(self, rank: int) -> Any:
        """Return the loss function or batch that the function supplied."""
        return self._rest

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss with the loss function, or from the batch."""
        with _user_code(self._spec):
            if callable(batch):
                loss: Tensor = batch(model)
                return loss
            if isinstance(batch, dict):
                out = model(**batch)
            else:
                out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        first = _first_tensor(out)
        if first is None:
            raise CommandError(
                f"The model of {self._spec} returned no floating-point tensor. Return a loss function "
                "with the model: a function that takes the model and returns the loss."
            )
        return first.float().mean()

    def backward(self, loss: Tensor) -> None:
        """Run backward from the loss."""
        # The exchange also runs in backward; its errors are not errors of the user's code.
        with _user_code(self._spec, but=RuntimeError):
            loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _user_code(spec: str, *, but: type[Exception] = dist.DistError) -> Iterator[None]:
    """Run user code: redirect its output and convert its exceptions, except those of type ``but``."""
    try:
        # Standard output is reserved for the command's own output, which may be one JSON object.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except but:
        raise
    except Exception as error:
        raise UserCodeError(
            f"Your function {spec}, or what it returned, raised {type(error).__name__}: {error}. The "
            "traceback above shows where. The function must run on its own: try it without effadam."
        ) from error


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | tuple | list):
        items = vars(value).values() if hasattr(value, "__dict__") else ()
    return next((first for item in items if (first := _first_tensor(item)) is not None), None)


def _look_up(spec: str) -> Callable[[], Any]:
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        raise CommandError(
            f"Invalid --model: {spec!r}. Must be module:function, such as train:build_model."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        with _user_code(spec, but=ImportError):
            module = importlib.import_module(module_name)
        make: Callable[[], Any] = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise CommandError(
            f"Invalid --model: {spec!r}: {error}. The module must be importable from the working "
            "directory and have that function."
        ) from error
    return make


def describe(model: nn.Module) -> list[ParameterSize]:
    """Return the sizes of a model's trainable parameters, in their order."""
    return [
        ParameterSize(p.numel(), p.shape[0] if p.ndim > 1 else 0)
        for p in model.parameters()
        if p.requires_grad and p.numel()
    ]


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch to a device; other values remain unchanged."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    return value


def parse_count(text: str) -> int:
    """Parse a number with an optional suffix.

    Args:
        text: The number, for example ``6.3M``, ``124000000`` or ``1.5B``.

    Returns:
        The number, rounded to an integer.

    Raises:
        ValueError: If the text is not such a number, or the number is less than 1.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([kmgb]?)", text.strip().lower())
    try:
        count = float(match[1]) * _FACTORS[match[2]] if match else 0.0
    except ValueError:
        count = 0.0
    if count < 1:
        raise ValueError(
            f"Invalid number: {text!r}. Must be 1 or more, such as 6300000, 6.3M or 1.5B."
        )
    return round(count)
