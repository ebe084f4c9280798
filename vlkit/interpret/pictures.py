"""Heat maps as pictures: laid over the image they explain, and side by side on one sheet."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlkit.escape import one_line

_HEAT = 0.55  # of the colour where the map is highest; below that the photograph shows through
_LINE = 36  # characters of a title that fit over a panel


class Panel(NamedTuple):
    """One picture of a sheet."""

    image: Image.Image
    title: str


def overlay(image: Image.Image, heat: Tensor, colours: str = "inferno") -> Image.Image:
    """An image with a heat map over it.

    Args:
        image: any size.
        heat: (rows,columns); scaled so that its lowest value is left clear and its highest is full colour. A map
            without differences is left clear.
        colours: a colour map of matplotlib.

    Returns:
        RGB, of the image's size.
    """
    from matplotlib import colormaps

    width, height = image.size
    large = F.interpolate(heat[None, None].float(), (height, width), mode="bilinear", align_corners=False)[0, 0]
    low, high = large.min(), large.max()
    scaled = ((large - low) / (high - low) if high > low else torch.zeros_like(large)).cpu().numpy()
    colour = colormaps[colours](scaled)[..., :3] * 255
    strength = (scaled * _HEAT)[..., None]
    photo = np.asarray(image.convert("RGB"), dtype=np.float32)
    return Image.fromarray((photo * (1 - strength) + colour * strength).round().astype(np.uint8))


def write_sheet(panels: Sequence[Panel], path: Path, columns: int = 4) -> None:
    """Panels in rows on one PNG, titles above; titles are shown as they are, never as markup."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(panel.image)
        axes.set_axis_off()
        # A dollar sign would start mathematics.
        title = textwrap.fill(one_line(panel.title)[:72], _LINE)
        axes.set_title(title.replace("$", r"\$"), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.05)  # the layout leaves no room for second lines
