"""The style transfer example: its loss, its decoders, its errors, and a short run on two workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from style import features, images, reshuffle  # noqa: E402


def feature_map(seed: int, height: int = 9, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, height, width, generator=generator, dtype=torch.float64)


def shuffled_blocks(features_: torch.Tensor, side: int) -> torch.Tensor:
    """Permute square blocks of a feature map."""
    blocks = reshuffle.patches(features_, side, side)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.fold(blocks[order].T[None], features_.shape[1:], side, stride=side)[
        0
    ]


@pytest.mark.parametrize("side", [1, 3])
def test_the_reshuffle_loss_of_a_permuted_feature_map_is_zero(side: int) -> None:
    style = feature_map(0)
    permuted = shuffled_blocks(style, side)
    assert not torch.equal(permuted, style)
    loss = reshuffle.reshuffle_loss(
        reshuffle.patches(permuted, side, side), reshuffle.patches(style, side, side)
    )
    assert loss == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_reshuffle_loss_bounds_the_local_and_the_global_loss(seed: int) -> None:
    content = reshuffle.patches(feature_map(seed), 2, 1)
    style = reshuffle.patches(feature_map(seed + 100) * 0.5 + 1, 2, 1)
    loss = reshuffle.reshuffle_loss(content, style)
    assert reshuffle.local_loss(content, style) < loss
    assert reshuffle.global_loss(content, style) < loss


def test_neither_the_local_nor_the_global_loss_sees_what_the_reshuffle_loss_sees() -> None:
    style = reshuffle.patches(feature_map(1), 1)
    one_everywhere = style[:1].expand_as(style)  # perfect patches, one of them repeated
    assert reshuffle.local_loss(one_everywhere, style) < 1e-12
    assert reshuffle.reshuffle_loss(one_everywhere, style) > 0.5
    washed_out = style.mean(0, keepdim=True).expand_as(
        style
    )  # perfect means, no patch of the style
    assert reshuffle.global_loss(washed_out, style) < 1e-12
    assert reshuffle.reshuffle_loss(washed_out, style) > 0.5


@pytest.mark.parametrize(("count", "styles"), [(40, 40), (41, 20), (20, 41)])
def test_every_style_patch_is_used_about_equally_often(count: int, styles: int) -> None:
    generator = torch.Generator().manual_seed(3)
    content = torch.randn(count, 4, generator=generator) * 0.01  # all nearest to the same patch
    matches = reshuffle.assign(content, torch.randn(styles, 4, generator=generator))
    uses = np.bincount(matches.numpy(), minlength=styles)
    assert uses.sum() == count
    assert uses.max() == -(-count // styles)


def test_decoders_return_images_of_the_size_that_was_encoded() -> None:
    encoder = features.SmallEncoder()
    levels = encoder(torch.rand(2, 3, 32, 48))
    assert [tuple(x.shape[1:]) for x in levels] == [(24, 16, 24), (48, 8, 12), (96, 4, 6)]
    for decoded in features.Decoders(encoder.channels)(levels):
        assert decoded.shape == (2, 3, 32, 48)


def test_vgg_weights_are_read_from_a_file_and_checked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = features.VGGEncoder().state_dict()
    torch.save({**weights, "classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg19.pth")
    encoder = features.load_vgg(tmp_path / "vgg19.pth")
    assert [x.shape[2] for x in encoder(torch.rand(1, 3, 32, 32))] == [16, 8, 4]
    torch.save({**weights, "features.5.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: features.5.weight is \[1\], but VGG-19 has"):
        features.load_vgg(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pth: not a file that torch.load reads"):
        features.load_vgg(tmp_path / "text.pth")


def test_bad_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken.png: not an image"):
        images.load_image(tmp_path / "broken.png", 32)
    with pytest.raises(ValueError, match=r"has 1 images .* needs at least 2"):
        images.image_files(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: no such image; .* or one of .*china"):
        images.find_image("nowhere")
    with pytest.raises(ValueError, match=r"has no patch of 3 x 3; use a larger image"):
        reshuffle.patches(torch.zeros(1, 2, 2), 3)


def test_two_workers_train_the_decoders_and_write_the_picture(tmp_path: Path) -> None:
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(256, size=(80, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    output = tmp_path / "out" / "result.png"
    command = (
        *(sys.executable, EXAMPLES / "style_transfer.py", "--compare", "--size", "32"),
        *("--images", tmp_path, "--content", tmp_path / "0.png", "--style", tmp_path / "1.png"),
        *("--encoder-steps", "2", "--steps", "3", "--iterations", "3", "--output", output),
    )
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size > 10_000
    rows = [line.split() for line in done.stdout.splitlines()]
    megabytes = {row[0]: float(row[2]) for row in rows if len(row) == 4 and row[0] != "mode"}
    assert 6 < megabytes["dense"] / megabytes["lloyd4"] < 8
