"""Progressive optimization of features, from the deepest level to the shallowest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .features import STRIDES, Decoders
from .reshuffle import MAX_PATCHES, assign, patches, reshuffle_loss

PATCH = 3  # positions
REMATCH_EVERY = 15  # iterations
LEARNING_RATE = 0.05  # of features with unit variance
SMALLEST_IMAGE = PATCH * STRIDES[-1]  # pixels


@torch.no_grad()
def decode(decoders: Decoders, level: int, features: Tensor) -> Tensor:
    """Decode one feature map [channels, height, width] to an image in [0, 1]."""
    return decoders.levels[level](features[None])[0].clamp(0, 1)


def stride_of(features: Tensor) -> int:
    """Return the distance between patches that keeps their number below `MAX_PATCHES`."""
    positions = features.shape[1] * features.shape[2]
    return max(1, math.ceil(math.sqrt(positions / MAX_PATCHES)))


def recolor(content: Tensor, style: Tensor) -> Tensor:
    """Give each channel of `content` the mean and standard deviation of that channel of `style`."""
    mean, std = content.mean((1, 2), keepdim=True), content.std((1, 2), keepdim=True)
    style_mean, style_std = style.mean((1, 2), keepdim=True), style.std((1, 2), keepdim=True)
    return (content - mean) / std.clamp(min=1e-6) * style_std + style_mean


class MatchedPatches:
    """Patches of a feature map, matched to the style's.

    With a distance of several positions between patches, the grid moves by one position at each
    assignment, so that no position is favored.
    """

    def __init__(self, style: Tensor) -> None:
        self._style = patches(style, PATCH, stride_of(style))
        self._round = 0

    def assign(self, features: Tensor) -> None:
        """Match the patches again."""
        self._stride = stride_of(features)
        self._top, self._left = divmod(self._round % self._stride**2, self._stride)
        self._round += 1
        self._matches = assign(self._cut(features), self._style)

    def loss(self, features: Tensor) -> Tensor:
        """Compute the reshuffle loss with the present matches."""
        return reshuffle_loss(self._cut(features), self._style, self._matches)

    def _cut(self, features: Tensor) -> Tensor:
        return patches(features[:, self._top :, self._left :], PATCH, self._stride)


def match_style(
    start: Tensor, target: Tensor, style: Tensor, content_weight: float, iterations: int
) -> tuple[Tensor, float, float]:
    """Optimize a feature map so that its patches are the style's, rearranged.

    Minimizes ``reshuffle + content_weight * mean squared distance to the target`` by Adam.

    Args:
        start: Features to start from, shape [channels, height, width].
        target: Features of the content, recolored; same shape.
        style: Features of the style, shape [channels, height, width].
        content_weight: Weight of the distance to the content.
        iterations: Steps of Adam; the patches are assigned again every few of them.

    Returns:
        The features, and the reshuffle loss before and after.
    """
    scale = style.std().clamp(min=1e-6)
    target = target / scale
    features = (start / scale).clone().requires_grad_()
    optimizer = torch.optim.Adam([features], lr=LEARNING_RATE)
    matched = MatchedPatches(style / scale)
    losses = []
    for iteration in range(iterations):
        if iteration % REMATCH_EVERY == 0:
            matched.assign(features)
        loss = matched.loss(features)
        losses.append(loss.item())
        total = loss + content_weight * nn.functional.mse_loss(features, target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return features.detach() * scale, losses[0], losses[-1]


def transfer(
    encoder: nn.Module,
    decoders: Decoders,
    content: Tensor,
    style: Tensor,
    content_weight: float,
    iterations: int,
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Give an image the style of another.

    At each level, from deep to shallow, the features of the current image are optimized towards the
    style and decoded; the next level encodes the result.

    Args:
        encoder: Returns the features of every level, shallow to deep.
        decoders: The inverses.
        content: RGB image in [0, 1], shape [3, height, width].
        style: RGB image in [0, 1], shape [3, height, width].
        content_weight: Weight of the distance to the content's features.
        iterations: Steps at each level.

    Returns:
        The image, and for each level from deep to shallow the reshuffle loss before and after.
    """
    image: Tensor | None = None
    losses = []
    with torch.no_grad():
        content_levels = [features[0] for features in encoder(content[None])]
        style_levels = [features[0] for features in encoder(style[None])]
    for level in reversed(range(len(style_levels))):
        target = recolor(content_levels[level], style_levels[level])
        start = target
        if image is not None:
            with torch.no_grad():
                start = encoder(image[None])[level][0]
        matched, before, after = match_style(
            start, target, style_levels[level], content_weight, iterations
        )
        losses.append((before, after))
        image = decode(decoders, level, matched)
    return image, losses
