"""Segmentations as pictures: each class in its colour over the photograph, with a legend.

labels = segmented(window_scores(...) * 40)                            # (H,W)
write_segmentation(picture, labels, ["cat", "grass"], Path("cat.png"))
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlkit.escape import one_line

_STRENGTH = 0.55  # of the colour; the photograph shows through
# Steps of the golden ratio around the circle of hues: neighbours differ, for any number of classes.
_HUE_STEP = 0.618034
_MOST_IN_LEGEND = 20


def colour_of(label: int) -> tuple[float, float, float]:
    """Red, green and blue in [0,1] of a class, the same in every picture."""
    return colorsys.hsv_to_rgb(label * _HUE_STEP % 1.0, 0.9 if label % 2 else 0.6, 1.0 if label % 3 else 0.75)


def overlay_regions(image: Image.Image, labels: Tensor) -> Image.Image:
    """An image with the region of each class in its colour.

    Args:
        image: any size.
        labels: (rows,columns) integers, enlarged to the image without mixing; below 0 is left clear.

    Returns:
        RGB, of the image's size.
    """
    width, height = image.size
    large = F.interpolate(labels[None, None].double(), (height, width), mode="nearest-exact")[0, 0].long()
    photo = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    for label in torch.unique(large[large >= 0]).tolist():
        inside = (large == label).numpy()
        photo[inside] = photo[inside] * (1 - _STRENGTH) + np.array(colour_of(label)) * 255 * _STRENGTH
    return Image.fromarray(photo.round().astype(np.uint8))


def write_segmentation(image: Image.Image, labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """The photograph beside its segmentation, with the names of the classes in it, largest first, on one PNG.

    Args:
        image: any size.
        labels: (rows,columns), numbers of `class_names`; below 0 is background.
        class_names: shown as they are, never as markup.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    present, counts = torch.unique(labels[labels >= 0], return_counts=True)
    by_area = present[counts.argsort(descending=True)].tolist()[:_MOST_IN_LEGEND]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, picture in enumerate((image, overlay_regions(image, labels)), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.imshow(picture)
        axes.set_axis_off()
    # A dollar sign would start mathematics.
    names = [one_line(class_names[label])[:40].replace("$", r"\$") for label in by_area]
    handles = [Patch(color=colour_of(label), label=name) for label, name in zip(by_area, names, strict=True)]
    if handles:
        figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
