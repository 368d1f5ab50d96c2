"""Load images: those that scikit-learn and scikit-image ship, or the user's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
SHIPPED = {  # files of each package; the wheels contain them, nothing is downloaded
    "sklearn": ("china.jpg", "flower.jpg"),
    "skimage": (
        "astronaut.png",
        "brick.png",
        "chelsea.png",
        "coffee.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
}
FOLDERS = {"sklearn": "datasets/images", "skimage": "data"}


def shipped_images() -> dict[str, Path]:
    """List the images of the installed packages by name, such as "china"."""
    found = {}
    for package, names in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent / FOLDERS[package]
        found.update({Path(name).stem: folder / name for name in names})
    return {name: path for name, path in sorted(found.items()) if path.is_file()}


def find_image(name: str) -> Path:
    """Return the path of an image that is given as a path or as the name of a shipped image.

    Raises:
        ValueError: There is neither such a file nor such a shipped image.
    """
    shipped = shipped_images()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ValueError(
            f"{name}: no such image; give the path of a file, or one of {', '.join(shipped)}"
        )
    return path


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder.

    Raises:
        ValueError: The folder does not exist or has fewer than two images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(
            f"{folder} has {len(files)} images ({', '.join(SUFFIXES)}); the encoder is trained to"
            " tell images apart and needs at least 2"
        )
    return files


def load_image(path: Path, size: int) -> Tensor:
    """Read an image, cut out its central square and scale it.

    Returns:
        RGB values in [0, 1], float32, shape [3, size, size].

    Raises:
        ValueError: The file is not an image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not an image that can be read ({error})") from error
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)
    scaled = functional.interpolate(
        square[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled[0].clamp(0, 1)


def save_row(path: Path, images: list[Tensor], titles: list[str]) -> None:
    """Write images [3, height, width] side by side with their titles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, row = plt.subplots(1, len(images), figsize=(2.6 * len(images), 2.9), squeeze=False)
    for axes, image, title in zip(row[0], images, titles, strict=True):
        axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
