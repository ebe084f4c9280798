"""A segmentation as a sheet of pictures: the photograph, its masks, what was found, and where one class was seen."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vlkit.interpret.pictures import Panel, overlay, write_sheet

# Of the colour over the photograph.
_STRENGTH = 0.6


def write_segmentation(
    folder: Path,
    key: str,
    pixels: Tensor,
    truth: Tensor,
    given: Tensor,
    probabilities: Tensor,
    names: Sequence[str],
) -> Path:
    """Write one sheet and say where.

    Args:
        folder: made if need be.
        key: of the photograph.
        pixels: (3,H,W) uint8.
        truth: (H,W) rows of classes, -1 where nothing is known.
        given: (H,W) rows of classes.
        probabilities: (C,H,W).
        names: (C,).
    """
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    panels = [
        Panel(photo, key),
        Panel(coloured(photo, truth), f"truth: {_most(truth, names)}"),
        Panel(coloured(photo, given.where(truth >= 0, -1)), f"found: {_most(given.where(truth >= 0, -1), names)}"),
    ]
    known = truth[truth >= 0]
    if len(known):
        largest = int(known.bincount().argmax())
        panels.append(Panel(overlay(photo, probabilities[largest]), f"seen: {names[largest]}"))
    # A key may hold folders, and a file's name must not leave this one.
    name = hashlib.sha256(key.encode()).hexdigest()[:8]
    path = folder / f"{Path(key).stem[:40]}_{name}.png"
    write_sheet(panels, path)
    return path


def coloured(photo: Image.Image, labels: Tensor) -> Image.Image:
    """The photograph with each class in a colour of its own; -1 is left clear."""
    from matplotlib import colormaps

    # Neighbouring classes should differ, so hues are a golden angle apart.
    hues = (labels.clamp(min=0).numpy() * 0.618034) % 1
    colour = colormaps["hsv"](hues)[..., :3] * 255
    strength = np.where(labels.numpy() >= 0, _STRENGTH, 0)[..., None]
    base = np.asarray(photo.convert("RGB"), dtype=np.float32)
    return Image.fromarray((base * (1 - strength) + colour * strength).round().astype(np.uint8))


def _most(labels: Tensor, names: Sequence[str]) -> str:
    """The classes with most pixels, by name."""
    known = labels[labels >= 0]
    counts = known.bincount(minlength=len(names))
    return ", ".join(names[row] for row in counts.argsort(descending=True)[:3].tolist() if counts[row])
