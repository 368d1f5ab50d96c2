"""Train a small CNN on handwritten digits, with quantized gradients between the workers.

    python examples/train_digits.py                    # two local workers, 4-bit gradients
    python examples/train_digits.py --compare --quantizers lloyd4,lloyd2,sign
    torchrun --nproc-per-node 4 examples/train_digits.py

The 1,797 images of 8 x 8 pixels are part of scikit-learn, so nothing is downloaded. A fifth of them is
the test set. The run ends with a table of accuracy and bytes, and a plot of accuracy against steps and
bytes in `outputs/train_digits.png`. The options are those of `train_text.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common.experiment import start
from common.options import add_arguments, read
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class DigitsOptions:
    """Options of the model."""

    width: int


class Digits:
    """Classification of handwritten digits; a `common.training.Task`."""

    name = "digits"
    headline = "accuracy"
    held_out_name = "test"
    unit = "images"
    units_per_sample = 1

    def __init__(self, options: DigitsOptions) -> None:
        self.options = options
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16  # 17 shades of gray
        train, test = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
        )
        classes = torch.from_numpy(labels)
        self.training = images[train], classes[train]
        self.test = images[test], classes[test]

    @property
    def description(self) -> str:
        """Return a one-line description of the data."""
        train, test = (len(classes) for _, classes in (self.training, self.test))
        return f"Digits: {train:,} images of 8 x 8 pixels to train on, {test} to test"

    def build_model(self) -> nn.Module:
        """Make a randomly initialized CNN."""
        width = self.options.width
        return nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, CLASSES),
        )

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Draw random training images and their digits."""
        images, classes = self.training
        chosen = torch.from_numpy(rng.integers(len(classes), size=count))
        return images[chosen], classes[chosen]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the test images and their digits."""
        return self.test


def main() -> None:
    """Parse the command line and start the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--width", type=int, default=32, help="channels of the first layer (default %(default)s)"
    )
    add_arguments(
        parser,
        steps=300,
        batch_size=16,
        lr=2e-3,
        lr_warmup=20,
        validate_every=20,
        plot=Path("outputs/train_digits.png"),
    )
    namespace = parser.parse_args()
    options = read(parser, namespace)
    if namespace.width < 1:
        parser.error(f"--width must be at least 1, got {namespace.width}")
    start(parser, options, Digits, DigitsOptions(namespace.width))


if __name__ == "__main__":
    main()
