"""Generated scenes: the same for the same seed, held-out kinds never in training, captions that are true."""

import io

import numpy as np
import pytest
from PIL import Image

from data_tools.scene_drawing import RGB, SIDE, render
from data_tools.scene_grammar import COLORS, HELD_OUT, SEEN, SHAPES, ColorShape, Group, Scene, captions
from data_tools.scenes import scene_source, write_class_folder


def test_same_seed_same_bytes_other_seed_other_scenes():
    one, again, other = (scene_source(20, seed) for seed in (0, 0, 1))
    assert [r.image.data for r in one] == [r.image.data for r in again] != [r.image.data for r in other]
    assert [r.captions for r in one] == [r.captions for r in again]


def test_kinds_are_split_so_that_every_color_and_shape_is_seen():
    assert len(SEEN) == 48 and len(HELD_OUT) == 16 and not set(SEEN) & set(HELD_OUT)
    for part in (SEEN, HELD_OUT):
        assert {kind.color for kind in part} == set(COLORS) and {kind.shape for kind in part} == set(SHAPES)


def test_held_out_kinds_are_in_no_caption():
    texts = " | ".join(text for record in scene_source(500, 3) for text in record.captions)
    assert not [kind.name for kind in HELD_OUT if kind.name in texts]
    assert all(kind.name in texts for kind in SEEN)


def test_gallery_captions_are_pairwise_distinct():
    source = scene_source(300, 5, distinct=True)
    texts = [text for record in source for text in record.captions]
    assert len(texts) == len(set(texts)) == 300


@pytest.mark.parametrize(
    ("relation", "axis", "first_is_lower"),
    [("left of", 1, True), ("right of", 1, False), ("above", 0, True), ("below", 0, False)],
)
def test_relation_is_where_the_caption_says(relation, axis, first_is_lower):
    """Centers of red and of blue pixels, along x (axis 1) or y (axis 0)."""
    red, blue = (Group(ColorShape(color, "circle"), "plain", "large", 1) for color in ("red", "blue"))
    scene = Scene((red, blue), relation)
    caption = captions(scene, np.random.default_rng(0))[0]
    assert caption == f"a large plain red circle {relation} a large plain blue circle"
    for seed in range(10):
        pixels = np.asarray(render(scene, np.random.default_rng(seed))).astype(int)
        centers = [np.argwhere(np.abs(pixels - RGB[color]).sum(-1) < 60)[:, axis].mean() for color in ("red", "blue")]
        assert (centers[0] < centers[1]) == first_is_lower


def test_class_folder(tmp_path):
    write_class_folder(tmp_path, SEEN[:2], per_class=3, seed=0)
    files = sorted(tmp_path.rglob("*.jpg"))
    folders = {kind.name.replace(" ", "_") for kind in SEEN[:2]}
    assert len(files) == 6 and {file.parent.name for file in files} == folders
    assert Image.open(io.BytesIO(files[0].read_bytes())).size == (SIDE, SIDE)
