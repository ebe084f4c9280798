"""Heat maps over images: hot where the map is high, the photograph untouched where it is low."""

import numpy as np
import torch
from PIL import Image

from vlkit.interpret.pictures import Panel, overlay, write_sheet


def test_overlay_colours_only_where_the_map_is_high():
    grey = Image.new("RGB", (40, 20), (100, 100, 100))
    heat = torch.zeros(2, 4)
    heat[0, 3] = 1.0
    out = np.asarray(overlay(grey, heat)).astype(int)
    assert out.shape == (20, 40, 3)
    assert (out[15:, :10] == 100).all()
    assert np.abs(out[2, 38] - 100).sum() > 100


def test_a_flat_map_changes_nothing():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert (np.asarray(overlay(grey, torch.ones(2, 2))) == 100).all()


def test_a_sheet_takes_hostile_titles(tmp_path):
    panels = [Panel(Image.new("RGB", (8, 8)), title) for title in ("$\\frac{", "\x1b[31mred\n", "a" * 300)]
    write_sheet(panels, tmp_path / "deep" / "sheet.png", columns=2)
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.size[0] > 400
