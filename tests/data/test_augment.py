"""Augmentation is drawn from nothing but its generator, and does what it says."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlkit.data.augment import Augment, decode_changed
from vlkit.data.decode import decode_image, image_to_tensor, open_image
from vlkit.data.randomness import generator
from vlkit.data.resizing import Box
from vlkit.errors import ConfigError


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    sample=st.integers(0, 2**40),
    low=st.floats(0.01, 1),
)
def test_crops_lie_inside_the_image(height: int, width: int, sample: int, low: float) -> None:
    box = Augment(crop_scale=(low, 1.0)).draw_box(height, width, generator(0, 0, sample, "augment"))
    assert box.height >= 1 and box.width >= 1
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width


def test_crops_have_the_area_and_ratio_asked_for() -> None:
    """Area uniform in [0.25, 0.5], log ratio uniform; positions reach all corners."""
    augment = Augment(crop_scale=(0.25, 0.5))
    boxes = [augment.draw_box(400, 400, generator(0, 0, sample, "augment")) for sample in range(4000)]
    area = np.array([box.height * box.width / 400**2 for box in boxes])
    ratio = np.array([math.log(box.width / box.height) for box in boxes])
    assert area.min() > 0.245 and area.max() < 0.505
    assert abs(area.mean() - 0.375) < 0.005 and abs(area.std() - 0.25 / math.sqrt(12)) < 0.003
    assert abs(ratio.mean()) < 0.01 and abs(ratio).max() < math.log(4 / 3) + 0.01
    assert min(box.top for box in boxes) == min(box.left for box in boxes) == 0
    assert max(box.top + box.height for box in boxes) == max(box.left + box.width for box in boxes) == 400


def test_crops_match_torchvisions_distribution() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 100, 300)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    augment = Augment(crop_scale=(0.3, 1.0))
    ours = np.array([augment.draw_box(100, 300, generator(0, 0, sample, "augment")) for sample in range(3000)])
    for column in range(4):
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.06 * theirs[:, column].mean() + 0.5
        assert abs(ours[:, column].std() - theirs[:, column].std()) < 0.1 * theirs[:, column].std() + 0.5


def test_an_image_too_long_for_the_ratio_gives_its_centre() -> None:
    assert Augment().draw_box(10, 1000, generator(0, 0, 0, "augment")) == Box(0, 493, 10, 13)
    assert Augment().draw_box(1000, 10, generator(0, 0, 0, "augment")) == Box(493, 0, 13, 10)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_decoding_no_more_than_the_crop_needs_changes_little(textured: Callable[[int, int], Image.Image]) -> None:
    augment = Augment(crop_scale=(0.5, 1.0), hflip=0.5)
    for width, height in ((100, 80), (640, 480), (1024, 768)):
        data = jpeg(Image.fromarray(np.array(textured(25, 19).resize((width, height), Image.Resampling.BICUBIC))))
        for sample in range(4):
            full = augment.apply(decode_image(data, where="x"), 64, "bicubic", generator(0, 0, sample, "augment"))
            image = open_image(data, where="x")
            choices = augment.draw(image.height, image.width, generator(0, 0, sample, "augment"))
            shrunk = decode_changed(image, choices, 64, "bicubic")
            assert shrunk.shape == (3, 64, 64)
            if width == 100:  # too small to be shrunk
                assert torch.equal(full, shrunk)
            assert (full.int() - shrunk.int()).abs().float().mean() < 3


@given(top=st.integers(0, 300), left=st.integers(0, 300), box_height=st.integers(1, 400), box_width=st.integers(1, 400))
def test_a_shrunk_box_lies_inside_the_shrunk_image(top: int, left: int, box_height: int, box_width: int) -> None:
    height, width = top + box_height, left + box_width
    for shrink in (2, 4, 8):
        small_height, small_width = -(-height // shrink), -(-width // shrink)
        box = Box(top, left, box_height, box_width).shrunk(shrink, small_height, small_width)
        assert box.top >= 0 and box.left >= 0 and box.height >= 1 and box.width >= 1
        assert box.top + box.height <= small_height and box.left + box.width <= small_width
        assert abs(box.top * shrink - top) <= shrink and abs(box.left * shrink - left) <= shrink


def test_augmentation_depends_on_the_generator_only(textured: Callable[[int, int], Image.Image]) -> None:
    image = image_to_tensor(textured(120, 90))
    augment = Augment((0.3, 1.0), hflip=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.3)
    first = [augment.apply(image, 32, "bicubic", generator(0, 1, sample, "augment")) for sample in range(8)]
    torch.manual_seed(123)
    np.random.seed(5)
    again = [augment.apply(image, 32, "bicubic", generator(0, 1, sample, "augment")) for sample in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in first}) == 8
    assert all(a.dtype == torch.uint8 and a.shape == (3, 32, 32) for a in first)


def test_flip_and_grey_happen_as_often_as_asked(textured: Callable[[int, int], Image.Image]) -> None:
    image = image_to_tensor(textured(32, 32))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    flip, grey = Augment(**whole, hflip=0.3), Augment(**whole, grayscale=0.7)  # type: ignore[arg-type]
    flipped = greyed = 0
    for sample in range(400):
        result = flip.apply(image, 32, "bicubic", generator(0, 0, sample, "augment"))
        assert torch.equal(result, image) or torch.equal(result, image.flip(2))
        flipped += torch.equal(result, image.flip(2))
        result = grey.apply(image, 32, "bicubic", generator(0, 0, sample, "augment"))
        assert torch.equal(result, image) or (torch.equal(result[0], result[1]) and torch.equal(result[0], result[2]))
        greyed += not torch.equal(result, image)
    assert abs(flipped / 400 - 0.3) < 0.07 and abs(greyed / 400 - 0.7) < 0.07


@pytest.mark.parametrize("which", range(4))
def test_colour_jitter_changes_what_it_says(which: int, textured: Callable[[int, int], Image.Image]) -> None:
    from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

    image = image_to_tensor(textured(32, 32))
    strength = [0.0] * 4
    strength[which] = 0.4
    augment = Augment((1.0, 1.0), (1.0, 1.0), color_jitter=tuple(strength))  # type: ignore[arg-type]
    result = augment.apply(image, 32, "bicubic", generator(0, 0, 5, "augment"))
    assert not torch.equal(result, image)
    change = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)[which]
    factors = np.linspace(-0.4, 0.4, 161) if which == 3 else np.linspace(0.6, 1.4, 161)
    nearest = min((change(image, float(factor)).int() - result.int()).abs().max() for factor in factors)
    assert nearest <= 3  # it is that change, by a factor within the range


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale is \(0.0, 1.0\); expected 0 < smallest"),
        ({"crop_scale": (0.9, 0.5)}, r"crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio"),
        ({"hflip": 1.5}, r"hflip is 1.5; a probability lies in \[0, 1\]"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.9)}, r"the last <= 0.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(**settings)
