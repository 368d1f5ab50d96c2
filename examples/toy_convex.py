"""Softmax regression: a stochastic convex problem whose best loss is known.

    python examples/toy_convex.py --compare --quantizers lloyd4,lloyd2,sign
    python examples/toy_convex.py --compare --quantizers lloyd2,sign --exchange update --lr 0.02
    torchrun --nproc-per-node 4 examples/toy_convex.py

Inputs are Gaussian with very unequal variances, and classes are drawn from the softmax of a fixed
linear map. The best loss is the entropy of the classes given the inputs, which is printed at the start;
a loss above it is due to the optimizer and the exchange. The run ends with a table and a plot of loss
against steps and bytes in `outputs/toy_convex.png`. The options are those of `train_text.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common.experiment import start
from common.options import add_arguments, read
from torch import Tensor, nn

HELD_OUT = 4096


@dataclass(frozen=True)
class ConvexOptions:
    """Options of the problem."""

    features: int
    classes: int


class Convex:
    """Classification with a known best loss; a `common.training.Task`."""

    name = "toy convex"
    headline = "loss"
    held_out_name = "validation"
    unit = "samples"
    units_per_sample = 1

    def __init__(self, options: ConvexOptions) -> None:
        self.options = options
        rng = np.random.default_rng(0)
        shape = options.classes, options.features
        # Features of sizes from 0.01 to 10, with weights that give all of them equal influence.
        self.sizes = np.geomspace(0.01, 10.0, options.features)
        self.weights = 4 * rng.standard_normal(shape) / self.sizes / options.features**0.5
        self.test = self.sample(rng, HELD_OUT)

    @property
    def description(self) -> str:
        """Return a one-line description of the data."""
        inputs, _ = self.test
        logits = inputs.double() @ torch.from_numpy(self.weights).T
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        return (
            f"Softmax regression: {self.options.features} features, {self.options.classes} classes;"
            f" the best loss on the held-out inputs is {entropy:.4f}"
        )

    def build_model(self) -> nn.Module:
        """Make a linear map of zeros, with which all classes are equally likely."""
        model = nn.Linear(self.options.features, self.options.classes, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Draw inputs, and classes from the softmax of the true map."""
        inputs = rng.standard_normal((count, self.options.features)) * self.sizes
        # The argmax of logits plus Gumbel noise is a sample of their softmax.
        noisy = inputs @ self.weights.T + rng.gumbel(size=(count, self.options.classes))
        return torch.from_numpy(inputs).float(), torch.from_numpy(noisy.argmax(axis=1))

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the held-out inputs and classes, equal at every call."""
        return self.test


def main() -> None:
    """Parse the command line and start the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    problem = parser.add_argument_group("problem")
    problem.add_argument("--features", type=int, default=500, help="default %(default)s")
    problem.add_argument("--classes", type=int, default=10, help="default %(default)s")
    add_arguments(
        parser,
        steps=1000,
        batch_size=32,
        lr=1e-2,
        lr_warmup=0,
        validate_every=50,
        weight_decay=0.0,
        plot=Path("outputs/toy_convex.png"),
    )
    namespace = parser.parse_args()
    options = read(parser, namespace)
    for name in ("features", "classes"):
        if getattr(namespace, name) < 2:
            parser.error(f"--{name} must be at least 2, got {getattr(namespace, name)}")
    start(parser, options, Convex, ConvexOptions(namespace.features, namespace.classes))


if __name__ == "__main__":
    main()
