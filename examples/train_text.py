"""Train a small GPT on source code, with quantized gradients between the workers.

    python examples/train_text.py                      # two local workers, 4-bit gradients
    python examples/train_text.py --no-effadam         # the same with DDP's fp32 all-reduce
    python examples/train_text.py --compare --quantizers lloyd4,lloyd2
    torchrun --nproc-per-node 4 examples/train_text.py

The text is Python's standard library, which is available on every machine; `--data DIR` selects a
folder of text files instead. The model predicts the next byte. Validation uses whole files, selected by
a hash of their names. The run ends with a table of loss and bytes, and a plot of loss against steps and
bytes in `outputs/train_text.png`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from common.experiment import start
from common.options import add_arguments, read
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes
EMBEDDING_STD = 0.3
VALIDATION_SHARE = 0.1  # of the files, and of the bytes at most
VALIDATION_WINDOWS = 256
SKIPPED_FOLDERS = {  # code of other projects, tests, and tables
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


@dataclass(frozen=True)
class TextOptions:
    """Options of text and model."""

    data: Path | None
    max_bytes: int
    context: int
    layers: int
    width: int
    heads: int


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, both pre-normalized and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.forward_norm = nn.LayerNorm(width)
        self.forward_in = nn.Linear(width, 4 * width, bias=False)
        self.forward_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform activations [batch, context, width]."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.forward_out(functional.gelu(self.forward_in(self.forward_norm(x))))


class GPT(nn.Module):
    """Decoder-only transformer over bytes."""

    def __init__(self, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits [batch, context, 256] of the next byte at every position."""
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Text:
    """Next-byte prediction; a `common.training.Task`."""

    name = "text"
    headline = "loss"
    held_out_name = "validation"
    unit = "tokens"

    def __init__(self, options: TextOptions) -> None:
        self.options = options
        self.units_per_sample = options.context
        self.training, self.validation = load(options.data, options.max_bytes)

    @property
    def description(self) -> str:
        """Return a one-line description of the data."""
        source = self.options.data or "Python's standard library"
        return (
            f"Text: {source}, {len(self.training) / 1e6:.2f} MB to train on,"
            f" {len(self.validation) / 1e6:.2f} MB in other files to validate"
        )

    def build_model(self) -> nn.Module:
        """Make a randomly initialized GPT."""
        options = self.options
        return GPT(options.context, options.layers, options.width, options.heads)

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Draw random windows of the training text, and the bytes that follow."""
        starts = rng.integers(len(self.training) - self.options.context, size=count)
        return self._windows(self.training, starts)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return evenly spaced windows of the validation text, and the bytes that follow."""
        last = len(self.validation) - self.options.context - 1
        return self._windows(
            self.validation, np.linspace(0, last, VALIDATION_WINDOWS, dtype=np.int64)
        )

    def _windows(self, text: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = text[starts[:, None] + np.arange(self.options.context + 1)]
        tokens = torch.from_numpy(windows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


@cache
def load(folder: Path | None, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the training text, at most `max_bytes`, and the validation text from other files."""
    files = text_files(folder)
    held_out = max(1, sum(position < VALIDATION_SHARE for position, _ in files))
    validation = read_bytes(files[:held_out], int(max_bytes * VALIDATION_SHARE))
    return read_bytes(files[held_out:], max_bytes), validation


def text_files(folder: Path | None) -> list[tuple[float, Path]]:
    """List the text files of `folder`, or of the standard library, each with a position in [0, 1).

    The position is a hash of the relative path, and the list is sorted by it. The order is equal on
    every machine, and the position of a file does not depend on other files.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    skipped = set() if folder else SKIPPED_FOLDERS
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        for name in names:
            path = Path(parent, name)
            if name[0] == "." or not (folder or path.suffix == ".py"):
                continue
            digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
            files.append((int.from_bytes(digest[:8], "big") / 2**64, path))
    return sorted(files)


def read_bytes(files: list[tuple[float, Path]], max_bytes: int) -> np.ndarray:
    """Read and concatenate text files, up to `max_bytes`; binary files are skipped."""
    text = bytearray()
    for _, path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            text += content
        if len(text) >= max_bytes:
            break
    return np.frombuffer(bytes(text[:max_bytes]), dtype=np.uint8)


def read_text_options(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace
) -> TextOptions:
    """Check the options of text and model; exit with a message if one is invalid."""
    options = TextOptions(
        namespace.data,
        namespace.max_bytes,
        namespace.context,
        namespace.layers,
        namespace.width,
        namespace.heads,
    )
    for name in ("max_bytes", "context", "layers", "width", "heads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.width % options.heads:
        parser.error(f"--width {options.width} must be a multiple of --heads {options.heads}")
    if options.data and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    task = Text(options)
    shortest = min(len(task.training), len(task.validation))
    if shortest < options.context + 2:
        parser.error(
            f"{options.data or 'the standard library'} has too little text: at least two files of"
            f" more than --context {options.context} bytes are needed; choose a folder with --data"
        )
    return options


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_argument_group("text and model")
    text.add_argument("--data", type=Path, metavar="DIR", help="folder of text files")
    text.add_argument(
        "--max-bytes",
        type=int,
        default=4_000_000,
        help="size of the training text (default %(default)s)",
    )
    text.add_argument("--context", type=int, default=64, help="bytes (default %(default)s)")
    text.add_argument("--layers", type=int, default=2, help="default %(default)s")
    text.add_argument("--width", type=int, default=128, help="default %(default)s")
    text.add_argument("--heads", type=int, default=4, help="default %(default)s")
    add_arguments(
        parser,
        steps=600,
        batch_size=8,
        lr=6e-3,
        lr_warmup=50,
        validate_every=50,
        plot=Path("outputs/train_text.png"),
    )
    return parser


def main() -> None:
    """Parse the command line and start the workers."""
    parser = build_parser()
    namespace = parser.parse_args()
    options = read(parser, namespace)
    start(parser, options, Text, read_text_options(parser, namespace))


if __name__ == "__main__":
    main()
