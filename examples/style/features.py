"""Encoder of images, and decoders that invert its features.

Features are taken at three levels, at 1/2, 1/4 and 1/8 of the image's resolution. The encoder is VGG-19
with weights from a file, or a small network that is trained on the spot to tell the images apart.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

LEVELS = 3
STRIDES = (2, 4, 8)  # of the levels, in pixels
SMALL_CHANNELS = (24, 48, 96)
# The convolutions of VGG-19 up to relu4_1 by their index in torchvision's `features`, with output
# channels; `None` is a pooling layer. A level is the activation after the first convolution of a stage.
VGG_LAYERS: tuple[tuple[int, int] | None, ...] = (
    *((0, 64), (2, 64), None, (5, 128), (7, 128), None),
    *((10, 256), (12, 256), (14, 256), (16, 256), None, (19, 512)),
)
VGG_LEVELS = (5, 10, 19)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Make a 3 x 3 convolution that keeps the size, and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect"), nn.ReLU()
    )


class SmallEncoder(nn.Module):
    """Three stages of two convolutions; each stage starts by halving the resolution."""

    channels = SMALL_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        widths = (12, *SMALL_CHANNELS)
        self.first = convolution(3, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AvgPool2d(2), convolution(before, after), convolution(after, after))
            for before, after in itertools.pairwise(widths)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the features of RGB images [batch, 3, height, width], shallow to deep."""
        x = self.first(images - 0.5)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


class VGGEncoder(nn.Module):
    """VGG-19 up to relu4_1, with relu2_1, relu3_1 and relu4_1 as levels."""

    channels = (128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        inputs = 3
        for layer in VGG_LAYERS:
            if layer is not None:
                index, outputs = layer
                self.features[str(index)] = nn.Conv2d(inputs, outputs, 3, padding=1)
                inputs = outputs
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the features of RGB images [batch, 3, height, width], shallow to deep."""
        x = (images - self.mean) / self.std
        levels = []
        for layer in VGG_LAYERS:
            if layer is None:
                x = nn.functional.max_pool2d(x, 2)
                continue
            x = self.features[str(layer[0])](x).relu()
            if layer[0] in VGG_LEVELS:
                levels.append(x)
        return levels


def load_vgg(path: Path) -> VGGEncoder:
    """Read the weights of VGG-19 as torchvision saves them.

    Raises:
        ValueError: The file does not exist, is not a file of tensors, or lacks a layer.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the state dict of torchvision's vgg19")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a file that torch.load reads ({error})") from error
    encoder = VGGEncoder()
    expected = encoder.state_dict()
    for name, tensor in expected.items():
        found = saved.get(name) if isinstance(saved, dict) else None
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else "missing"
            raise ValueError(
                f"{path}: {name} is {shape}, but VGG-19 has {list(tensor.shape)}; give the state"
                " dict of torchvision's vgg19"
            )
    encoder.load_state_dict({name: saved[name] for name in expected})
    return encoder


class Decoder(nn.Module):
    """Inverse of the encoder for one level: features to an RGB image."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (*channels[::-1], min(channels[0], 32))
        for before, after in itertools.pairwise(widths):
            layers += [
                convolution(before, after),
                nn.Upsample(scale_factor=2, mode="nearest"),
                convolution(after, after),
            ]
        layers.append(nn.Conv2d(widths[-1], 3, 3, padding=1, padding_mode="reflect"))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Compute images [batch, 3, height, width] around [0, 1]."""
        return self.layers(features) + 0.5


class Decoders(nn.Module):
    """One decoder for each level; the model that is trained data-parallel."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Decoder(channels[: level + 1]) for level in range(len(channels))
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Decode the features of every level, shallow to deep."""
        return [decoder(features) for decoder, features in zip(self.levels, levels, strict=True)]
