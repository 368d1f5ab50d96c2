"""Tasks on which the benchmarks of quality train several simulated workers.

Everything in a step is a function of (seed, step, worker), so that all methods see the same data.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from common.training import cross_entropy, lr_factor
from train_text import GPT, Text, TextOptions

__all__ = ["Code", "CodeLoRA", "Digits", "Prose", "Recurrent", "Task", "lr_factor"]

_TEXT_BYTES = 4_000_000
_LORA_RANK = 8


class Task(Protocol):
    """A classification problem with its model."""

    def build_model(self) -> nn.Module:
        """Make the model; the caller has set the seed."""

    def loss(self, model: nn.Module, seed: int, step: int, worker: int) -> Tensor:
        """Return the mean loss of a worker's batch."""

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Return mean loss, in nats, and accuracy on the held-out samples."""


class Prose:
    """The next byte of Python's standard library, with the GPT of `examples/train_text.py`.

    Args:
        layers: Number of layers.
        width: Width of the model.
        batch: Sequences of 64 bytes per worker and step.
        folder: Another folder of text files.
    """

    def __init__(self, layers: int, width: int, batch: int, folder: Path | None = None) -> None:
        self._text = Text(TextOptions(folder, _TEXT_BYTES, 64, layers, width, 4))
        self._batch = batch
        self._held_out = self._text.held_out()

    def build_model(self) -> nn.Module:
        """Make the model; the caller has set the seed."""
        return self._text.build_model()

    def loss(self, model: nn.Module, seed: int, step: int, worker: int) -> Tensor:
        """Return the mean loss of a worker's batch."""
        rng = np.random.default_rng([seed, step, worker])
        inputs, classes = self._text.sample(rng, self._batch)
        return cross_entropy(model(inputs), classes)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Return mean loss, in nats, and accuracy on the held-out samples."""
        return _evaluate(model, *self._held_out)


class Recurrent(Prose):
    """The same bytes, with a recurrent model.

    Args:
        width: Width of the recurrent layer; that of the embedding is half of it.
        batch: Sequences of 64 bytes per worker and step.
    """

    def __init__(self, width: int, batch: int) -> None:
        super().__init__(1, width, batch)
        self._width = width

    def build_model(self) -> nn.Module:
        """Make the model; the caller has set the seed."""
        return _GRU(self._width)


class _GRU(nn.Module):
    """One recurrent layer over bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width // 2)
        self.recurrent = nn.GRU(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits [batch, context, 256] of the next byte at every position."""
        logits: Tensor = self.head(self.recurrent(self.bytes(tokens))[0])
        return logits


class Code(Prose):
    """C++: the headers that torch installs, from a model that was trained on Python.

    Args:
        checkpoint: The weights of a :class:`Prose` model of the same size.
        layers: Number of layers.
        width: Width of the model.
        batch: Sequences of 64 bytes per worker and step.
    """

    def __init__(self, checkpoint: Path, layers: int, width: int, batch: int) -> None:
        if not checkpoint.is_file():
            sys.exit(f"{checkpoint} is missing: run the task 'text' first.")
        self._checkpoint = checkpoint
        super().__init__(layers, width, batch, Path(torch.__file__).parent / "include")

    def build_model(self) -> nn.Module:
        """Make the model with the weights of the checkpoint."""
        model = super().build_model()
        model.load_state_dict(torch.load(self._checkpoint, weights_only=True))
        return model


class CodeLoRA(Code):
    """The same with frozen weights: only low-rank additions to the matrices of all layers train."""

    def build_model(self) -> nn.Module:
        """Make the model with the weights of the checkpoint."""
        model = super().build_model().requires_grad_(False)
        assert isinstance(model, GPT)
        for block in model.blocks:
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(block, name, _LowRank(layer))
        return model


class _LowRank(nn.Module):
    """A frozen linear layer, and the product of two trained matrices."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, _LORA_RANK, bias=False)
        self.up = nn.Linear(_LORA_RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Digits:
    """Scikit-learn's 1,797 digits in clutter, 16 x 16 pixels, with a small ResNet.

    A digit is turned, scaled and moved; pieces of other digits and noise are added. The test set is
    drawn once from a fifth of the digits.

    Args:
        batch: Images per worker and step.
        width: Channels of the first stage.
    """

    def __init__(self, batch: int, width: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
        classes = torch.from_numpy(labels)
        train, test = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
        )
        self._images, self._classes = images[train], classes[train]
        self._batch, self._width = batch, width
        chosen = torch.arange(4 * len(test)) % len(test)
        self._test = _clutter(images[test], chosen, np.random.default_rng(0)), classes[test][chosen]

    def build_model(self) -> nn.Module:
        """Make the ResNet."""
        width = self._width
        return nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(_Residual(width, width, 1), _Residual(width, 2 * width, 2)),
            *(_Residual(2 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(4 * width, 10),
        )

    def loss(self, model: nn.Module, seed: int, step: int, worker: int) -> Tensor:
        """Return the mean loss of a worker's batch."""
        rng = np.random.default_rng([seed, step, worker])
        chosen = torch.from_numpy(rng.integers(len(self._classes), size=self._batch))
        images = _clutter(self._images, chosen, rng)
        return cross_entropy(model(images), self._classes[chosen])

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Return mean loss, in nats, and accuracy on the held-out samples."""
        return _evaluate(model, *self._test)


class _Residual(nn.Module):
    """Two convolutions with batch normalization, and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def _clutter(digits: Tensor, chosen: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw images [count, 1, 16, 16] of the chosen digits."""
    count = len(chosen)
    angles = rng.uniform(-math.pi / 6, math.pi / 6, count)
    zoom = 1 / rng.uniform(0.4, 0.7, count)
    shift = rng.uniform(-0.4, 0.4, (count, 2))
    cos, sin = zoom * np.cos(angles), zoom * np.sin(angles)
    rows = [[cos, -sin, zoom * shift[:, 0]], [sin, cos, zoom * shift[:, 1]]]
    matrix = torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()
    grid = functional.affine_grid(matrix, [count, 1, 16, 16], align_corners=False)
    images = functional.grid_sample(digits[chosen], grid, align_corners=False)
    for _ in range(3):
        pieces = digits[torch.from_numpy(rng.integers(len(digits), size=count))]
        at = rng.integers(0, (5, 5, 13, 13), (count, 4))
        for image, piece, (row, column, top, left) in zip(images, pieces, at, strict=True):
            patch = image[:, top : top + 4, left : left + 4]
            torch.maximum(patch, piece[:, row : row + 4, column : column + 4], out=patch)
    return images + torch.from_numpy(rng.normal(0, 0.15, images.shape)).float()


@torch.no_grad()
def _evaluate(model: nn.Module, inputs: Tensor, classes: Tensor) -> tuple[float, float]:
    model.eval()
    loss, right = 0.0, 0
    for batch, wanted in zip(inputs.split(64), classes.split(64), strict=True):
        logits = model(batch)
        loss += cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
    model.train()
    return loss / classes.numel(), right / classes.numel()
