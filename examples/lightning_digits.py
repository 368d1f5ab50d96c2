"""The digits example in PyTorch Lightning: a small CNN, with LightningCLI and a YAML file.

    python examples/lightning_digits.py                          # settings of lightning_digits.yaml
    python examples/lightning_digits.py --compare                # also with plain ddp; plots both
    python examples/lightning_digits.py --trainer.strategy effadam --trainer.devices 4

Model, data and learning rate are those of `train_digits.py`. The Trainer runs the training loop.
"""

from __future__ import annotations

from pathlib import Path

from common.lightning import TaskData, TaskModule, start
from train_digits import Digits, DigitsOptions

import lightning_plugin  # noqa: F401  registers the strategy "effadam"


class DigitsModule(TaskModule):
    """A CNN.

    Args:
        width: Channels of the first layer.
        lr: Peak learning rate.
        lr_warmup: Steps of linear warm-up; cosine decay to 0 follows.
        weight_decay: Decoupled weight decay.
        update_mode: Whether to exchange Adam updates instead of gradients.
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
        batch_size: Images per worker.
        seed: Random seed of the order.
    """

    def __init__(self, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__(Digits(DigitsOptions(width=0)), batch_size, seed)


if __name__ == "__main__":
    start(DigitsModule, DigitsData, Path(__file__).with_suffix(".yaml"))
