"""The text example in PyTorch Lightning: a small GPT on source code, by LightningCLI and a YAML file.

    python examples/lightning_text.py                            # as lightning_text.yaml says
    python examples/lightning_text.py --compare                  # plain ddp too, and a plot of both
    python examples/lightning_text.py --trainer.strategy ddp     # plain ddp alone
    python examples/lightning_text.py --trainer.strategy.quantizer lloyd2 --model.update_mode true
    torchrun --nproc-per-node 2 examples/lightning_text.py --trainer.devices 2

Model, data and learning rate are those of `train_text.py`; the loop is the Trainer's.
"""

from __future__ import annotations

from pathlib import Path

from common.lightning import TaskData, TaskModule, start
from pytorch_lightning.cli import LightningArgumentParser
from train_text import GPT, Text, TextOptions

import lightning_plugin  # noqa: F401  makes "effadam" known to the Trainer


class TextModule(TaskModule):
    """A GPT over bytes.

    Args:
        context: bytes that the model sees.
        layers: transformer blocks.
        width: of the activations.
        heads: of the attention.
        lr: peak learning rate.
        lr_warmup: steps of linear warm-up; cosine decay to 0 follows.
        weight_decay: decoupled.
        update_mode: exchange Adam updates in place of gradients.
    """

    def __init__(
        self,
        context: int = 64,
        layers: int = 2,
        width: int = 128,
        heads: int = 4,
        lr: float = 4e-3,
        lr_warmup: int = 50,
        weight_decay: float = 0.01,
        update_mode: bool = False,
    ) -> None:
        super().__init__(lr, lr_warmup, weight_decay, update_mode)
        self.network = GPT(context, layers, width, heads)


class TextData(TaskData):
    """Python's standard library, or a folder of text files.

    Args:
        data: a folder; None for the standard library.
        max_bytes: of training text.
        context: bytes to a sample.
        batch_size: samples per worker.
        seed: of the order.
    """

    def __init__(
        self,
        data: Path | None = None,
        max_bytes: int = 4_000_000,
        context: int = 64,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        options = TextOptions(data, max_bytes, context, layers=0, width=0, heads=0)
        super().__init__(Text(options), batch_size, seed)


def link(parser: LightningArgumentParser) -> None:
    parser.link_arguments("data.context", "model.context")


if __name__ == "__main__":
    start(TextModule, TextData, Path(__file__).with_suffix(".yaml"), link=link)
