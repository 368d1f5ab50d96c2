"""The text example in PyTorch Lightning: a GPT on source code, with LightningCLI and a YAML file.

    python examples/lightning_text.py                            # settings of lightning_text.yaml
    python examples/lightning_text.py --compare                  # also with plain ddp; plots both
    python examples/lightning_text.py --trainer.strategy ddp     # plain ddp only
    python examples/lightning_text.py --trainer.strategy.quantizer lloyd2 --model.update_mode true
    torchrun --nproc-per-node 2 examples/lightning_text.py --trainer.devices 2

Model, data and learning rate are those of `train_text.py`. The Trainer runs the training loop.
"""

from __future__ import annotations

from pathlib import Path

from common.lightning import TaskData, TaskModule, start
from pytorch_lightning.cli import LightningArgumentParser
from train_text import GPT, Text, TextOptions

import lightning_plugin  # noqa: F401  registers the strategy "effadam"


class TextModule(TaskModule):
    """A GPT over bytes.

    Args:
        context: Context length in bytes.
        layers: Number of transformer blocks.
        width: Width of the activations.
        heads: Number of attention heads.
        lr: Peak learning rate.
        lr_warmup: Steps of linear warm-up; cosine decay to 0 follows.
        weight_decay: Decoupled weight decay.
        update_mode: Whether to exchange Adam updates instead of gradients.
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
    """Source code of Python's standard library, or a folder of text files.

    Args:
        data: Folder of text files; None for the standard library.
        max_bytes: Maximum size of the training text in bytes.
        context: Bytes per sample.
        batch_size: Samples per worker.
        seed: Random seed of the order.
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
