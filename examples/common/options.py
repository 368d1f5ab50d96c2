"""Command-line options that the training examples share, checked and picklable."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .launch import under_torchrun

OPTIMIZERS = ("adamw", "adam", "sgd")
EXCHANGES = ("gradient", "preconditioned", "update", "weights")
SECOND_MOMENTS = ("local", "matched", "shared", "frozen")


@dataclass(frozen=True)
class Mode:
    """Exchange of the gradients in one run: dense, or quantized in both directions.

    Attributes:
        uplink: Quantizer from workers to server; None for a dense run.
        downlink: Quantizer from server to workers; None for a dense run.
        name: Name of the mode; None to derive it from the quantizers.
    """

    uplink: str | None = None
    downlink: str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Mode:
        """Parse `NAME` (both directions) or `UP/DOWN`."""
        uplink, _, downlink = text.strip().partition("/")
        return cls(uplink, downlink or uplink)

    @property
    def is_dense(self) -> bool:
        """Return whether DDP's own all-reduce averages the gradients."""
        return self.uplink is None

    @property
    def label(self) -> str:
        """Return the name of the mode in tables and plots."""
        if self.name is not None:
            return self.name
        if self.uplink is None:
            return "dense"
        return self.uplink if self.uplink == self.downlink else f"{self.uplink}/{self.downlink}"


@dataclass(frozen=True)
class Options:
    """Options that do not depend on the task; `add_arguments` describes them."""

    workers: int
    device: str
    effadam: bool
    quantizer: str
    worker_quantizer: str | None
    server_quantizer: str | None
    topology: str
    nodes: int
    block_size: int | None
    warmup_steps: int
    exchange: str
    second_moment: str
    refresh_every: int
    compare: bool
    quantizers: str | None
    optimizer: str
    lr: float
    lr_warmup: int
    betas: list[float]
    weight_decay: float
    steps: int
    stop_after: int | None
    batch_size: int
    seed: int
    validate_every: int
    checkpoint: Path | None
    resume: Path | None
    plot: Path | None
    json: Path | None
    csv: Path | None
    log: Path | None

    @property
    def modes(self) -> list[Mode]:
        """Return the modes to run, in order."""
        uplink = self.worker_quantizer or self.quantizer
        downlink = self.server_quantizer or self.quantizer
        if self.compare and self.quantizers:
            return [Mode(), *map(Mode.parse, self.quantizers.split(","))]
        if self.compare:
            return [Mode(), Mode(uplink, downlink)]
        return [Mode(uplink, downlink) if self.effadam else Mode()]


def add_arguments(parser: argparse.ArgumentParser, **defaults: float | Path) -> None:
    """Add the shared options to `parser`, with the example's `defaults`."""
    parser.add_argument(
        "--workers",
        type=int,
        help="local processes to start (default 2; under torchrun, the world size)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: CUDA if there is a GPU for each local worker (default %(default)s)",
    )

    exchange = parser.add_argument_group("gradient exchange")
    exchange.add_argument(
        "--effadam",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantize gradients in both directions, or use DDP's all-reduce (default on)",
    )
    exchange.add_argument("--quantizer", default="lloyd4", help="default %(default)s")
    exchange.add_argument("--worker-quantizer", help="uplink only (default: --quantizer)")
    exchange.add_argument("--server-quantizer", help="downlink only (default: --quantizer)")
    exchange.add_argument(
        "--topology",
        choices=("auto", "hierarchical", "sharded", "rank0"),
        default="auto",
        help="who averages: every worker a share, rank 0, or nodes first (default %(default)s)",
    )
    exchange.add_argument(
        "--nodes",
        type=int,
        default=0,
        metavar="M",
        help="treat the workers as M nodes of consecutive ranks (default: nodes are the hosts)",
    )
    exchange.add_argument(
        "--block-size", type=int, help="elements per scale (default: by the rows of the model)"
    )
    exchange.add_argument(
        "--warmup-steps",
        type=int,
        default=0,
        help="steps of dense all-reduce before quantization starts (default %(default)s)",
    )
    exchange.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default="gradient",
        help="what is exchanged: the gradient; the gradient divided by the root of Adam's second"
        " moment; EfficientAdam's update; or updates up and weights down, as in Quantized Adam"
        " (default %(default)s)",
    )
    exchange.add_argument(
        "--second-moment",
        choices=SECOND_MOMENTS,
        default="local",
        help="of EfficientAdam: local to each worker, local with steps matched to those of DDP, shared,"
        " or frozen after --warmup-steps (default %(default)s)",
    )
    exchange.add_argument(
        "--refresh-every",
        type=int,
        default=64,
        help="steps between dense averages for --second-moment shared (default %(default)s)",
    )
    exchange.add_argument(
        "--compare",
        action="store_true",
        help="train dense, then quantized, from the same seed on the same data",
    )
    exchange.add_argument(
        "--quantizers",
        metavar="Q[,Q...]",
        help="with --compare: the quantizers to compare with dense; UP/DOWN for different quantizers"
        " per direction, for example lloyd4,lloyd2,sign/lloyd4",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    training.add_argument("--lr", type=float, help="peak learning rate (default %(default)s)")
    training.add_argument(
        "--lr-warmup",
        type=int,
        help="steps of linear warm-up; cosine decay to 0 follows (default %(default)s)",
    )
    training.add_argument(
        "--betas",
        type=float,
        nargs=2,
        default=[0.9, 0.999],
        metavar="B",
        help="betas of Adam (default 0.9 0.999)",
    )
    training.add_argument("--weight-decay", type=float, default=0.01, help="default %(default)s")
    training.add_argument("--steps", type=int, help="default %(default)s")
    training.add_argument("--batch-size", type=int, help="per worker (default %(default)s)")
    training.add_argument(
        "--seed", type=int, default=0, help="weights and data order (default %(default)s)"
    )
    training.add_argument(
        "--validate-every", type=int, help="steps between validations (default %(default)s)"
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="write a checkpoint of all workers after every validation",
    )
    files.add_argument(
        "--resume", type=Path, metavar="PATH", help="continue from a checkpoint, exactly"
    )
    files.add_argument(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="end the run early, at this step",
    )
    files.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="curves against steps and bytes (default %(default)s)",
    )
    files.add_argument("--no-plot", dest="plot", action="store_const", const=None)
    files.add_argument("--json", type=Path, metavar="PATH", help="curves, settings and environment")
    files.add_argument("--csv", type=Path, metavar="PATH", help="curves, one row per validation")
    files.add_argument(
        "--run-log",
        "--log",  # ambiguous under torchrun, which has options that begin so
        dest="log",
        type=Path,
        metavar="PATH",
        help="one JSON line per step, for `effadam report`; with --compare, one file for each mode",
    )
    parser.set_defaults(**defaults)


def read(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> Options:
    """Check and return the shared options; exit with a message if one is invalid."""
    if namespace.workers is None:
        namespace.workers = int(os.environ["WORLD_SIZE"]) if under_torchrun() else 2
    options = Options(**{field.name: getattr(namespace, field.name) for field in fields(Options)})
    error = _find_error(options)
    if error:
        parser.error(error)
    return options


def _find_error(options: Options) -> str | None:
    for name, minimum in (
        ("workers", 1),
        ("steps", 1),
        ("batch_size", 1),
        ("block_size", 1),
        ("validate_every", 1),
        ("stop_after", 1),
        ("refresh_every", 1),
        ("warmup_steps", 0),
        ("nodes", 0),
        ("lr_warmup", 0),
        ("weight_decay", 0),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < minimum:
            return f"--{name.replace('_', '-')} must be at least {minimum}, got {value}"
    if options.nodes and options.workers % options.nodes:
        return f"--nodes {options.nodes} does not divide --workers {options.workers} evenly"
    if not options.lr > 0:
        return f"--lr must be positive, got {options.lr}"
    if not all(0 <= beta < 1 for beta in options.betas):
        return f"--betas must be at least 0 and below 1, got {options.betas}"
    if under_torchrun() and options.workers != int(os.environ["WORLD_SIZE"]):
        return (
            f"--workers {options.workers} contradicts torchrun's world size"
            f" {os.environ['WORLD_SIZE']}; omit --workers"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: PyTorch finds no GPU; use --device cpu"
    if options.exchange != "gradient" and options.optimizer == "sgd":
        return f"--exchange {options.exchange} needs the moments of Adam: omit --optimizer sgd"
    if options.second_moment == "frozen" and options.warmup_steps == 0:
        return "--second-moment frozen is estimated during --warmup-steps, which must be above 0"
    if options.compare and not options.effadam:
        return "--compare includes a dense run; omit --no-effadam"
    if options.quantizers and not options.compare:
        return "--quantizers requires --compare; use --quantizer for a single run"
    if options.quantizers and (options.worker_quantizer or options.server_quantizer):
        return "--quantizers accepts UP/DOWN pairs; omit --worker-quantizer and --server-quantizer"
    if options.compare and (options.checkpoint or options.resume):
        return "--checkpoint and --resume apply to a single run; omit --compare"
    if options.resume and not options.resume.is_file():
        return f"--resume {options.resume}: no such file"
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        return "the plot needs matplotlib: pip install matplotlib, or use --no-plot"
    return _find_attach_error(options)


def _find_attach_error(options: Options) -> str | None:
    """Return the error that `attach` would raise on every worker, before workers are started."""
    for mode in options.modes:
        if mode.is_dense:
            continue
        from effadam_hook import EfficientAdamState

        try:
            EfficientAdamState(**exchange_arguments(options, mode))
        except (TypeError, ValueError) as error:
            return str(error)
    return None


def exchange_arguments(options: Options, mode: Mode) -> dict[str, Any]:
    """Return the keyword arguments of `attach` for a quantized run."""
    nodes = options.nodes
    return {
        "worker_quantizer": mode.uplink,
        "server_quantizer": mode.downlink,
        "topology": options.topology,
        "device_mesh": (nodes, options.workers // nodes) if nodes else None,
        "block_size": options.block_size,
        "warmup_steps": options.warmup_steps,
    }
