"""A segmentation as a sheet of pictures: the photograph, its masks, what was found, and where one class was seen."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from vlkit.interpret.pictures import Panel, overlay, write_sheet
from vlkit.interpret.regions import overlay_regions


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
        Panel(overlay_regions(photo, truth), f"truth: {_most(truth, names)}"),
        Panel(
            overlay_regions(photo, given.where(truth >= 0, -1)), f"found: {_most(given.where(truth >= 0, -1), names)}"
        ),
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


def _most(labels: Tensor, names: Sequence[str]) -> str:
    """The classes with most pixels, by name."""
    known = labels[labels >= 0]
    counts = known.bincount(minlength=len(names))
    return ", ".join(names[row] for row in counts.argsort(descending=True)[:3].tolist() if counts[row])
