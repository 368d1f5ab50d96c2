"""What is trained: a perceptron that computes, one that only takes its time, or the user's model."""

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
from effadam_hook.planner.traffic import Parameter

__all__ = ["Trained", "UserModel", "Workload", "describe", "parse_count", "to_device"]

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


class Trained(Protocol):
    """A model and what it is trained on."""

    def model(self) -> nn.Module:
        """The bare model, the same on every rank."""
        ...

    def batch(self, rank: int) -> Any:
        """A rank's batch."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, from the model as it is wrapped."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backward from the loss."""
        ...


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

    def backward(self, loss: Tensor) -> None:
        """Backward from the loss."""
        loss.backward()  # type: ignore[no-untyped-call]


class _Asleep(nn.Module):
    """A layer with a linear layer's parameters, which sleeps a third forward and the rest backward."""

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
    """A user's model, named as ``module:function``.

    The function takes no arguments and returns the model; or the model and a function that makes a
    loss of the (wrapped) model; or the model and a batch, of which the mean of the output is the loss.

    Args:
        spec: The name.

    What the user's code prints goes to standard error. What it raises becomes a
    :class:`~effadam_hook.errors.UserCodeError`.

    Raises:
        CommandError: If there is no such function, it returns something else, or a model without
            trainable parameters.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._make = _look_up(spec)
        self._rest: Any = None

    def model(self) -> nn.Module:
        """The bare model, the same on every rank: the function runs with seed 0."""
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
                f"The model of {self._spec} has no trainable parameters, and so nothing to average. "
                "Some parameter must have requires_grad=True: return the model as it is trained."
            )
        self._rest = made[1]
        return model

    @property
    def can_step(self) -> bool:
        """Whether there is anything to compute a loss from; known once the model was made."""
        return self._rest is not None

    def batch(self, rank: int) -> Any:
        """What came with the model."""
        return self._rest

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss, as the function's second value says."""
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
                f"The model of {self._spec} returned no floating tensor. Return a loss function "
                "besides the model: a function that takes the model and returns the loss."
            )
        return first.float().mean()

    def backward(self, loss: Tensor) -> None:
        """Backward from the loss."""
        # The exchange runs in backward too, and what it raises is not the user's.
        with _user_code(self._spec, but=RuntimeError):
            loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _user_code(spec: str, *, but: type[Exception] = dist.DistError) -> Iterator[None]:
    """Where the user's code runs; errors of the type ``but`` stay as they are."""
    try:
        # Standard output may be one JSON object, and is nobody else's.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except but:
        raise
    except Exception as error:
        raise UserCodeError(
            f"Your function {spec}, or what it returned, raised {type(error).__name__}: {error}. The "
            "traceback above says where. It must run by itself: try it without this command."
        ) from error


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | tuple | list):
        items = vars(value).values() if hasattr(value, "__dict__") else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


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
        found = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise CommandError(
            f"Invalid --model: {spec!r}: {error}. The module must be importable from the working "
            "directory and have that function."
        ) from error
    make: Callable[[], Any] = found
    return make


def describe(model: nn.Module) -> list[Parameter]:
    """A model's trainable parameters for the cost model, in their order."""
    return [
        Parameter(p.numel(), p.shape[0] if p.ndim > 1 else 0)
        for p in model.parameters()
        if p.requires_grad and p.numel()
    ]


def to_device(value: Any, device: torch.device) -> Any:
    """A batch, however nested, with its tensors on a device; what is none stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    return value


def parse_count(text: str) -> int:
    """A number as people write it.

    Args:
        text: Such as ``6.3M``, ``124000000`` or ``1.5B``.

    Returns:
        The number.

    Raises:
        ValueError: If it is not understood.
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
