"""Style transfer by reshuffling deep features; its decoders are trained with quantized gradients.

    python examples/style_transfer.py                  # two local workers, 4-bit gradients
    python examples/style_transfer.py --compare        # fp32 first, then 4 bits
    python examples/style_transfer.py --content photo.jpg --style painting.png --images my_images
    python examples/style_transfer.py --encoder vgg19.pth    # torchvision's weights, a file of yours
    torchrun --nproc-per-node 2 examples/style_transfer.py --no-effadam

First a small encoder learns to tell images apart (omitted with `--encoder`). Then one decoder for each
level of the encoder learns to invert its features: data-parallel, and this is the workload of the hook.
Finally rank 0 optimizes the content's features level by level, from deep to shallow, so that their
patches are a rearrangement of the style's (arXiv 1805.04103; `style/reshuffle.py` has the loss), and
writes content, style and result to `outputs/style_transfer.png`.

The images are those that scikit-learn and scikit-image ship; nothing is downloaded. The one that is
held out measures the decoders: the loss is the mean squared error of the decoded pixels.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common.launch import Worker, launch, under_torchrun
from style.features import STRIDES, Decoders, SmallEncoder, load_vgg
from style.images import find_image, image_files, load_image, save_row, shipped_images
from style.transfer import SMALLEST_IMAGE, transfer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import EfficientAdamState, attach

BATCH = 6  # crops per worker
CROP = 64  # pixels
FEATURE_WEIGHT = 0.02  # of the features' error in the loss of a decoder
BUCKET_CAP_MB = 0.5


@dataclass(frozen=True)
class Options:
    """Checked options of the command line."""

    content: Path
    style: Path
    images: tuple[Path, ...]
    encoder: Path | None
    size: int
    encoder_steps: int
    steps: int
    lr: float
    iterations: int
    content_weight: float
    modes: tuple[str, ...]
    topology: str
    seed: int
    output: Path


@dataclass(frozen=True)
class Result:
    """Decoders of one mode.

    Attributes:
        decoders: The trained model.
        loss: Mean squared error of the held-out image's pixels, over all levels.
        wire_bytes: Bytes that one worker sent and received.
        seconds: Training time.
    """

    decoders: Decoders
    loss: float
    wire_bytes: int
    seconds: float


def random_crops(images: Tensor, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Draw square crops, half of them mirrored, and the indices of their images."""
    chosen = rng.integers(len(images), size=count)
    corners = rng.integers(images.shape[-1] - CROP + 1, size=(count, 2))
    crops = torch.stack(
        [
            images[index, :, top : top + CROP, left : left + CROP]
            for index, (top, left) in zip(chosen, corners, strict=True)
        ]
    )
    mirrored = torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None]
    return torch.where(mirrored, crops.flip(-1), crops), torch.from_numpy(chosen)


def train_encoder(images: Tensor, options: Options, worker: Worker) -> SmallEncoder:
    """Train the small encoder to tell from the mean of its features which image a crop is from.

    Gradients are averaged by DDP in fp32, so that all modes of a comparison have the same encoder.
    """
    torch.manual_seed(options.seed)
    encoder = SmallEncoder().to(worker.device)
    heads = nn.ModuleList(nn.Linear(width, len(images)) for width in encoder.channels)
    classifier = DistributedDataParallel(Classifier(encoder, heads).to(worker.device))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for step in range(options.encoder_steps):
        rng = np.random.default_rng([options.seed, 1, step, worker.rank])
        crops, labels = random_crops(images, rng, BATCH)
        logits = classifier(crops.to(worker.device))
        loss = functional.cross_entropy(logits, labels.to(worker.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


class Classifier(nn.Module):
    """Linear classification of the features' means, summed over the levels."""

    def __init__(self, encoder: SmallEncoder, heads: nn.ModuleList) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = heads

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [batch, images]."""
        levels = self.encoder(images)
        return torch.stack(
            [head(x.mean((2, 3))) for head, x in zip(self.heads, levels, strict=True)]
        ).sum(0)


def decoder_loss(encoder: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """Compute the error of decoded pixels, and of their features, over all levels."""
    with torch.no_grad():
        levels = encoder(images)
    loss = images.new_zeros(())
    for level, decoded in enumerate(model(levels)):
        features = levels[level]
        error = functional.mse_loss(encoder(decoded)[level], features) / features.var()
        loss = loss + functional.mse_loss(decoded, images) + FEATURE_WEIGHT * error
    return loss


def train_decoders(
    encoder: nn.Module,
    images: Tensor,
    held_out: Tensor,
    mode: str,
    options: Options,
    worker: Worker,
) -> Result:
    """Train the decoders data-parallel; `mode` is "dense" or the name of a quantizer."""
    torch.manual_seed(options.seed)
    decoders = Decoders(encoder.channels).to(worker.device)
    model = DistributedDataParallel(decoders, bucket_cap_mb=BUCKET_CAP_MB)
    state: EfficientAdamState | None = None
    if mode != "dense":
        state = attach(model, quantizer=mode, topology=options.topology)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps + 1)
    start = time.perf_counter()
    for step in range(options.steps):
        rng = np.random.default_rng([options.seed, 2, step, worker.rank])
        crops, _ = random_crops(images, rng, BATCH)
        loss = decoder_loss(encoder, model, crops.to(worker.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if worker.is_main and (step + 1) % max(1, options.steps // 5) == 0:
            print(
                f"  {mode}: step {step + 1} of {options.steps}, loss {loss.item():.4f}", flush=True
            )
    seconds = time.perf_counter() - start
    dense_bytes = 8 * options.steps * sum(each.numel() for each in decoders.parameters())
    wire_bytes = dense_bytes
    if state is not None:
        stats = state.stats()
        wire_bytes = int(stats["uplink_bytes"] + stats["downlink_bytes"])
        state.close()
    with torch.no_grad():
        decoded = decoders(encoder(held_out[None]))
        loss = torch.stack([functional.mse_loss(each[0], held_out) for each in decoded]).mean()
    return Result(decoders, loss.item(), wire_bytes, seconds)


def run(worker: Worker, options: Options) -> None:
    """Train on every worker; transfer the style on the main worker."""
    loaded = torch.stack([load_image(path, max(options.size, CROP)) for path in options.images])
    images, held_out = loaded[:-1], loaded[-1].to(worker.device)
    if options.encoder is not None:
        encoder: nn.Module = load_vgg(options.encoder).to(worker.device)
    else:
        encoder = train_encoder(images, options, worker)
    encoder.requires_grad_(False).eval()
    results = {}
    for mode in options.modes:
        results[mode] = train_decoders(encoder, images, held_out, mode, options, worker)
    if not worker.is_main:
        return
    content, style = (
        load_image(path, options.size).to(worker.device)
        for path in (options.content, options.style)
    )
    pictures, titles = [content, style], ["content", "style"]
    print(f"\n{'mode':<10}{'held-out loss':>14}{'MB sent and received':>22}{'seconds':>9}")
    for mode, result in results.items():
        print(
            f"{mode:<10}{result.loss:>14.5f}{result.wire_bytes / 1e6:>22.1f}{result.seconds:>9.1f}"
        )
    for mode, result in results.items():
        picture, losses = transfer(
            encoder, result.decoders, content, style, options.content_weight, options.iterations
        )
        path = ", ".join(f"{before:.3f} to {after:.3f}" for before, after in losses)
        print(f"{mode}: reshuffle loss from deep to shallow {path}")
        pictures.append(picture)
        titles.append(f"decoders: {mode}")
    save_row(options.output, [picture.cpu() for picture in pictures], titles)
    print(f"Wrote {options.output}")


def read_options() -> tuple[Options, int]:
    """Read and check the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="default %(default)s")
    files = parser.add_argument_group("images")
    files.add_argument("--content", default="astronaut", help="path or name (default %(default)s)")
    files.add_argument("--style", default="coffee", help="path or name (default %(default)s)")
    files.add_argument("--images", type=Path, metavar="DIR", help="training images")
    files.add_argument("--encoder", type=Path, metavar="PTH", help="weights of VGG-19")
    files.add_argument("--size", type=int, default=128, help="pixels a side (default %(default)s)")
    files.add_argument("--output", type=Path, default=Path("outputs/style_transfer.png"))
    training = parser.add_argument_group("training")
    training.add_argument("--effadam", action=argparse.BooleanOptionalAction, default=True)
    training.add_argument("--compare", action="store_true", help="fp32 first, then quantized")
    training.add_argument("--quantizer", default="lloyd4", help="default %(default)s")
    training.add_argument("--topology", default="auto", help="default %(default)s")
    training.add_argument("--encoder-steps", type=int, default=150, help="default %(default)s")
    training.add_argument("--steps", type=int, default=200, help="default %(default)s")
    training.add_argument("--lr", type=float, default=4e-3, help="default %(default)s")
    training.add_argument("--seed", type=int, default=0)
    optimization = parser.add_argument_group("transfer")
    optimization.add_argument("--iterations", type=int, default=60, help="at each level")
    optimization.add_argument(
        "--content-weight", type=float, default=1.0, help="default %(default)s"
    )
    read = parser.parse_args()
    for name in ("workers", "steps", "encoder_steps", "iterations"):
        if getattr(read, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(read, name)}"
            )
    if read.size % STRIDES[-1] or read.size < SMALLEST_IMAGE:
        parser.error(
            f"--size must be a multiple of {STRIDES[-1]} and at least {SMALLEST_IMAGE}, got {read.size}"
        )
    if read.compare and not read.effadam:
        parser.error("--compare includes a dense run; omit --no-effadam")
    try:
        if read.effadam:
            EfficientAdamState(quantizer=read.quantizer, topology=read.topology)
        paths = [find_image(read.content), find_image(read.style)]
        shipped = list(shipped_images().values())
        images = image_files(read.images) if read.images else shipped
        for path in (*paths, *images):
            load_image(path, SMALLEST_IMAGE)
        if read.encoder:
            load_vgg(read.encoder)
    except ValueError as error:
        parser.error(str(error))
    quantized = (read.quantizer,) if read.effadam else ()
    dense = ("dense",) if read.compare or not read.effadam else ()
    options = Options(
        content=paths[0],
        style=paths[1],
        images=tuple(images),
        encoder=read.encoder,
        size=read.size,
        encoder_steps=read.encoder_steps,
        steps=read.steps,
        lr=read.lr,
        iterations=read.iterations,
        content_weight=read.content_weight,
        modes=dense + quantized,
        topology=read.topology,
        seed=read.seed,
        output=read.output,
    )
    return options, read.workers


def main() -> None:
    """Parse the command line and start the workers."""
    options, workers = read_options()
    names = ", ".join(path.stem for path in options.images[:-1])
    print(f"Trained on {names}; held out: {options.images[-1].stem}", flush=True)
    launch(run, 0 if under_torchrun() else workers, "auto", options)


if __name__ == "__main__":
    main()
