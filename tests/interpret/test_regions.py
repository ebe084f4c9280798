from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlkit.interpret.regions import colour_of, overlay_regions, write_segmentation


def test_each_region_has_its_colour_and_background_none() -> None:
    photo = Image.fromarray(np.full((4, 6, 3), 100, np.uint8))
    labels = torch.tensor([[0, 3, -1], [0, 3, 3]])
    found = np.asarray(overlay_regions(photo, labels)).astype(float)
    assert found.shape == (4, 6, 3) and (found[:2, 4:] == 100).all()
    for label, place in ((0, (0, 0)), (3, (3, 5)), (3, (1, 3))):
        assert np.abs(found[place] - (45 + 0.55 * 255 * np.array(colour_of(label)))).max() <= 0.51
    distances = [np.abs(np.subtract(colour_of(a), colour_of(b))).max() for a in range(30) for b in range(a)]
    assert min(distances) > 0.02


def test_the_picture_is_written_with_hostile_names(tmp_path: Path) -> None:
    photo = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    labels = torch.arange(2).repeat(3, 1)
    write_segmentation(photo, labels, ["$\\frac{$", "<b>two\n</b>"], tmp_path / "new" / "a.png")
    write_segmentation(photo, labels - 5, ["all", "background"], tmp_path / "b.png")
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.width > 800
    assert (tmp_path / "b.png").stat().st_size > 1000
