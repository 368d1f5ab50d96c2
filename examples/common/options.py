"""The command line that the training examples share, and its checked, picklable form."""

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
SECOND_MOMENTS = ("local", "shared", "frozen")


@dataclass(frozen=True)
class Mode:
    """How gradients travel in one run: as they are (dense), or quantized on the way up and down.

    Attributes:
        uplink: quantizer from workers to server; None for a dense run.
        downlink: quantizer from server to workers; None for a dense run.
        name: what to call the mode; None to call it after its quantizers.
    """

    uplink: str | None = None
    downlink: str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Mode:
        """Read `NAME` (both directions) or `UP/DOWN`."""
        uplink, _, downlink = text.strip().partition("/")
        return cls(uplink, downlink or uplink)

    @property
    def is_dense(self) -> bool:
        """Whether gradients travel in full, by DDP's own all-reduce."""
        return self.uplink is None

    @property
    def label(self) -> str:
        """The mode's name in tables and plots."""
        if self.name is not None:
            return self.name
        if self.uplink is None:
            return "dense"
        return self.uplink if self.uplink == self.downlink else f"{self.uplink}/{self.downlink}"


@dataclass(frozen=True)
class Options:
    """What the command line decides, whatever the task; see `add_arguments` for the meanings."""

    workers: int
    device: str
    effadam: bool
    quantizer: str
    worker_quantizer: str | None
    server_quantizer: str | None
    topology: str
    block_size: int
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
        """The runs to do, in order."""
        uplink = self.worker_quantizer or self.quantizer
        downlink = self.server_quantizer or self.quantizer
        if self.compare and self.quantizers:
            return [Mode(), *map(Mode.parse, self.quantizers.split(","))]
        if self.compare:
            return [Mode(), Mode(uplink, downlink)]
        return [Mode(uplink, downlink) if self.effadam else Mode()]


def add_arguments(parser: argparse.ArgumentParser, **defaults: float | Path) -> None:
    """Add the shared options to `parser`; `defaults` are the example's own."""
    parser.add_argument(
        "--workers",
        type=int,
        help="local processes to start (default 2; under torchrun, its world size)",
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
        help="quantize gradients both ways, or leave them to DDP's all-reduce (default on)",
    )
    exchange.add_argument("--quantizer", default="lloyd4", help="default %(default)s")
    exchange.add_argument("--worker-quantizer", help="uplink only (default: --quantizer)")
    exchange.add_argument("--server-quantizer", help="downlink only (default: --quantizer)")
    exchange.add_argument(
        "--topology",
        choices=("rank0", "sharded"),
        default="rank0",
        help="one server, or a share of it on every worker (default %(default)s)",
    )
    exchange.add_argument(
        "--block-size", type=int, default=256, help="elements to a scale (default %(default)s)"
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
        help="what travels: the gradient; the gradient in units of the root of Adam's second moment;"
        " EfficientAdam's update; or updates up and weights down, as in Quantized Adam"
        " (default %(default)s)",
    )
    exchange.add_argument(
        "--second-moment",
        choices=SECOND_MOMENTS,
        default="local",
        help="EfficientAdam's: each worker's own, shared, or frozen after --warmup-steps"
        " (default %(default)s)",
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
        help="with --compare: the quantizers to compare with dense; UP/DOWN for different ones"
        " each way, for example lloyd4,lloyd2,sign/lloyd4",
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
        help="Adam's (default 0.9 0.999)",
    )
    training.add_argument("--weight-decay", type=float, default=0.01, help="default %(default)s")
    training.add_argument("--steps", type=int, help="default %(default)s")
    training.add_argument("--batch-size", type=int, help="per worker (default %(default)s)")
    training.add_argument(
        "--seed", type=int, default=0, help="weights and data order (default %(default)s)"
    )
    training.add_argument("--validate-every", type=int, help="steps (default %(default)s)")

    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="write a checkpoint, of all workers, after every validation",
    )
    files.add_argument(
        "--resume", type=Path, metavar="PATH", help="continue from a checkpoint, exactly"
    )
    files.add_argument(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="end the run early, at this step of the --steps planned",
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
        "--log",
        type=Path,
        metavar="PATH",
        help="one JSON line per step, for `effadam report`; with --compare, one file for each mode",
    )
    parser.set_defaults(**defaults)


def read(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> Options:
    """Check the shared options and return them; ends the program with a message if one is wrong."""
    if namespace.workers is None:
        namespace.workers = int(os.environ["WORLD_SIZE"]) if under_torchrun() else 2
    options = Options(**{field.name: getattr(namespace, field.name) for field in fields(Options)})
    complaint = _complaint(options)
    if complaint:
        parser.error(complaint)
    return options


def _complaint(options: Options) -> str | None:
    for name, least in (
        ("workers", 1),
        ("steps", 1),
        ("batch_size", 1),
        ("block_size", 1),
        ("validate_every", 1),
        ("stop_after", 1),
        ("refresh_every", 1),
        ("warmup_steps", 0),
        ("lr_warmup", 0),
        ("weight_decay", 0),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            return f"--{name.replace('_', '-')} must be at least {least}, got {value}"
    if not options.lr > 0:
        return f"--lr must be positive, got {options.lr}"
    if not all(0 <= beta < 1 for beta in options.betas):
        return f"--betas must be at least 0 and below 1, got {options.betas}"
    if under_torchrun() and options.workers != int(os.environ["WORLD_SIZE"]):
        return (
            f"--workers {options.workers} contradicts torchrun's world size"
            f" {os.environ['WORLD_SIZE']}; leave --workers out"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: this PyTorch sees no GPU; use --device cpu"
    if options.exchange != "gradient" and options.optimizer == "sgd":
        return f"--exchange {options.exchange} needs the moments of Adam: leave --optimizer sgd out"
    if options.second_moment == "frozen" and options.warmup_steps == 0:
        return "--second-moment frozen is estimated during --warmup-steps: set them above 0"
    if options.compare and not options.effadam:
        return "--compare trains dense as well; leave --no-effadam out"
    if options.quantizers and not options.compare:
        return "--quantizers belongs to --compare; use --quantizer for a single run"
    if options.quantizers and (options.worker_quantizer or options.server_quantizer):
        return "--quantizers takes UP/DOWN pairs; leave --worker- and --server-quantizer out"
    if options.compare and (options.checkpoint or options.resume):
        return "--checkpoint and --resume belong to a single run; leave --compare out"
    if options.resume and not options.resume.is_file():
        return f"--resume {options.resume}: no such file"
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        return "the plot needs matplotlib: pip install matplotlib, or pass --no-plot"
    return _attach_complaint(options)


def _attach_complaint(options: Options) -> str | None:
    """What the library would refuse in every worker, found out before any is started."""
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
    """The keyword arguments of `attach` for a quantized run."""
    return {
        "worker_quantizer": mode.uplink,
        "server_quantizer": mode.downlink,
        "topology": options.topology,
        "block_size": options.block_size,
        "warmup_steps": options.warmup_steps,
    }
