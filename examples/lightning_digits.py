"""The digits example in PyTorch Lightning: a small CNN, by LightningCLI and a YAML file.

    python examples/lightning_digits.py                          # as lightning_digits.yaml says
    python examples/lightning_digits.py --compare                # plain ddp too, and a plot of both
    python examples/lightning_digits.py --trainer.strategy effadam --trainer.devices 4

Model, data and learning rate are those of `train_digits.py`; the loop is the Trainer's.
"""

from __future__ import annotations

from pathlib import Path

from common.lightning import TaskData, TaskModule, start
from train_digits import Digits, DigitsOptions

import lightning_plugin  # noqa: F401  makes "effadam" known to the Trainer


class DigitsModule(TaskModule):
    """A CNN.

    Args:
        width: channels of the first layer.
        lr: peak learning rate.
        lr_warmup: steps of linear warm-up; cosine decay to 0 follows.
        weight_decay: decoupled.
        update_mode: exchange Adam updates in place of gradients.
    """

    def __init__(
        self,
        width: int = 32,
        lr: float = 2e-3,
        lr_warmup: int = 20,
        weight_decay: float = 0.01,
        update_mode: bool = False,
    ) -> None:
        super().__init__(lr, lr_warmup, weight_decay, update_mode)
        self.network = Digits(DigitsOptions(width)).build_model()


class DigitsData(TaskData):
    """1,797 images of 8 x 8 pixels.

    Args:
        batch_size: images per worker.
        seed: of the order.
    """

    def __init__(self, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__(Digits(DigitsOptions(width=0)), batch_size, seed)


if __name__ == "__main__":
    start(DigitsModule, DigitsData, Path(__file__).with_suffix(".yaml"))
