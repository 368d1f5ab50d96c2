"""Reshuffle loss: a style loss between global statistics and local patches.

Style transfer by reshuffling deep features (arXiv 1805.04103) asks for an image whose feature map is a
spatial permutation of the style image's. Global losses (means, Gram matrices) are unchanged by a
permutation but do not know which patches exist; local losses (nearest style patch) know the patches but
may use one of them everywhere. Here every patch is matched to a style patch under the constraint that
each style patch is used equally often:

    reshuffle(F, S) = min over assignments a of  mean over i of ||P_i(F) - P_a(i)(S)||^2 / length

With n patches in F and m in S, each style patch is used at most ceil(n / m) times. It follows that

    local(F, S) <= reshuffle(F, S)                    the minimum without the constraint
    (mean(F) - mean(S))^2 <= reshuffle(F, S)          for n = m, by convexity
    reshuffle(F, S) = 0  =>  equal means and Gram matrices   for patches of one position, n = m

The assignment is SciPy's `linear_sum_assignment`, exact, with a time that grows about as n^3: keep n
below some 2,000.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

MAX_PATCHES = 1100  # a fifth of a second for each assignment


def patches(features: Tensor, size: int, stride: int = 1) -> Tensor:
    """Cut a feature map into square patches.

    Args:
        features: Feature map, shape [channels, height, width].
        size: Side of a patch, in positions.
        stride: Distance between patches, in positions.

    Returns:
        Patches, shape [count, channels * size * size].

    Raises:
        ValueError: The map is smaller than one patch.
    """
    if min(features.shape[1:]) < size:
        raise ValueError(
            f"a feature map of {features.shape[1]} x {features.shape[2]} positions has no patch of"
            f" {size} x {size}; use a larger image"
        )
    return functional.unfold(features[None], size, stride=stride)[0].T


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Compute the mean squared difference of every pair of patches, shape [count 1, count 2]."""
    products = first @ second.T
    squares = first.square().sum(1)[:, None] + second.square().sum(1)[None]
    return (squares - 2 * products).clamp_(min=0) / first.shape[1]


def assign(content: Tensor, style: Tensor) -> Tensor:
    """Match every patch of `content` to a patch of `style`, each used about equally often.

    Args:
        content: Patches, shape [n, length].
        style: Patches, shape [m, length].

    Returns:
        For each content patch the index of its style patch, int64, shape [n]. No index occurs more
        than ceil(n / m) times.
    """
    copies = -(-len(content) // len(style))
    costs = squared_distances(content.detach().double(), style.detach().double())
    _, columns = linear_sum_assignment(costs.repeat(1, copies).cpu().numpy())
    return torch.from_numpy(columns).to(content.device) % len(style)


def reshuffle_loss(content: Tensor, style: Tensor, matches: Tensor | None = None) -> Tensor:
    """Compute the reshuffle loss of patches; differentiable with respect to both arguments.

    Args:
        content: Patches, shape [n, length].
        style: Patches, shape [m, length].
        matches: Result of `assign`; by default it is computed.
    """
    if matches is None:
        matches = assign(content, style)
    return functional.mse_loss(content, style[matches])


def local_loss(content: Tensor, style: Tensor) -> Tensor:
    """Compute the mean squared distance of each patch to its nearest style patch."""
    return squared_distances(content, style).min(1).values.mean()


def global_loss(content: Tensor, style: Tensor) -> Tensor:
    """Compute the mean squared difference of the patches' means."""
    return functional.mse_loss(content.mean(0), style.mean(0))
