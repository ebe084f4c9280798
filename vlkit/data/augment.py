"""Random changes of training images, drawn first and applied afterwards.

    augment = Augment(crop_scale=(0.4, 1.0), hflip=0.5)
    square = augment.apply(image, 64, "bicubic", generator(seed, epoch, sample_id, "augment"))

What is drawn (`Choices`) needs the size of the image only, not its pixels, so a JPEG can be decoded no larger than
its crop needs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vlkit.data.decode import EncodedImage
from vlkit.data.rand_augment import Distortion, RandAugment, distort
from vlkit.data.resizing import Box, Interpolation, cut, interpolate
from vlkit.errors import ConfigError

_CROP_ATTEMPTS = 10


class Choices(NamedTuple):
    """What happens to one image."""

    box: Box
    flip: bool
    distortions: tuple[Distortion, ...]
    jitter: tuple[tuple[str, float], ...]  # (what, factor) in the order of application
    grey: bool
    dct_scale: int = 2  # see `Augment`


@dataclass(frozen=True)
class Augment:
    """Random crop, mirroring and colour; everything is drawn from the generator passed in, in a fixed order.

    The defaults are open_clip's: a random crop of 90-100% of the area and nothing else.

    Attributes:
        crop_scale: smallest and largest share of the image's area that the crop covers.
        crop_ratio: smallest and largest width / height of the crop.
        hflip: probability of mirroring. Captions that say left or right then lie.
        color_jitter: strength of brightness, contrast, saturation and hue (hue at most 0.5), or None.
        color_jitter_probability: how often `color_jitter` is applied.
        grayscale: probability of removing the colour.
        rand_augment: RandAugment's number of operations and magnitude, or None.
        dct_scale: a JPEG may be decoded to half, a quarter or an eighth, though not below this many times the size
            of the result. 2 is nearly exact; 1 is faster on large images, at an error that `EncodedImage.shrink_for`
            names.

    Source: random resized crop as in Szegedy et al. 2014, arXiv:1409.4842, in torchvision's form.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    color_jitter: tuple[float, float, float, float] | None = None
    color_jitter_probability: float = 1.0
    grayscale: float = 0.0
    rand_augment: RandAugment | None = None
    dct_scale: int = 2

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_scale is {self.crop_scale}; expected 0 < smallest <= largest <= 1.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ConfigError(f"crop_ratio is {self.crop_ratio}; expected 0 < smallest <= largest.")
        for name in ("hflip", "color_jitter_probability", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a probability lies in [0, 1].")
        if self.dct_scale not in (1, 2):
            raise ConfigError(f"dct_scale is {self.dct_scale}; expected 1 or 2.")
        if self.color_jitter and (min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5):
            raise ConfigError(f"color_jitter is {self.color_jitter}; expected four numbers >= 0, the last <= 0.5.")

    def apply(self, image: Tensor, size: int, interpolation: Interpolation, generator: np.random.Generator) -> Tensor:
        """(3, H, W) uint8 of any size to (3, size, size) uint8."""
        choices = self.draw(image.shape[1], image.shape[2], generator)
        return _changed(cut(image, choices.box), choices, size, interpolation).contiguous()

    def draw(self, height: int, width: int, generator: np.random.Generator) -> Choices:
        """What will happen to an image of this size."""
        box = self.draw_box(height, width, generator)
        flip = self.hflip > 0 and generator.random() < self.hflip
        distortions = () if self.rand_augment is None else self.rand_augment.draw(generator)
        jitter: tuple[tuple[str, float], ...] = ()
        if self.color_jitter and generator.random() < self.color_jitter_probability:
            jitter = _draw_jitter(self.color_jitter, generator)
        grey = self.grayscale > 0 and generator.random() < self.grayscale
        return Choices(box, flip, distortions, jitter, grey, self.dct_scale)

    def draw_box(self, height: int, width: int, generator: np.random.Generator) -> Box:
        """A random part of an image; its centre, as far as the ratio allows, when ten attempts do not fit."""
        low, high = self.crop_scale
        log_low, log_high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for _ in range(_CROP_ATTEMPTS):
            scale, ratio, top, left = generator.random(4).tolist()
            area = height * width * (low + (high - low) * scale)
            aspect = math.exp(log_low + (log_high - log_low) * ratio)
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                places = int(top * (height - box_height + 1)), int(left * (width - box_width + 1))
                return Box(*places, box_height, box_width)
        aspect = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        box_width = max(min(width, round(height * aspect)), 1)
        box_height = max(min(height, round(width / aspect)), 1)
        return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def decode_changed(image: EncodedImage, choices: Choices, size: int, interpolation: Interpolation) -> Tensor:
    """Decode and change an image: as `Augment.apply`, but a JPEG is decoded no larger than the crop needs.

    Args:
        image: its header.
        choices: drawn for its size.
        size: height and width of the result, in pixels.
        interpolation: filter of the resize.

    Returns:
        (3, size, size) uint8 in any layout.

    Raises:
        BrokenImageError: the image is truncated or corrupt.
    """
    return next(decode_views(image, (choices,), size, interpolation))


def decode_views(
    image: EncodedImage, views: Sequence[Choices], size: int, interpolation: Interpolation
) -> Iterator[Tensor]:
    """Several views of one image, each as `decode_changed` gives it alone; those of one scale share the decoding."""
    decoded: dict[int, Tensor] = {}
    for choices in views:
        box = choices.box
        shrink = image.shrink_for(box.height, box.width, size, choices.dct_scale)
        if shrink not in decoded:
            decoded[shrink] = image.decode(shrink)
        pixels = decoded[shrink]
        if shrink > 1:
            box = box.shrunk(shrink, pixels.shape[1], pixels.shape[2])
        yield _changed(cut(pixels, box), choices, size, interpolation)


def _changed(image: Tensor, choices: Choices, size: int, interpolation: Interpolation) -> Tensor:
    """Everything but the crop."""
    image = interpolate(image, size, size, interpolation)
    if choices.flip:
        image = image.flip(2)
    for operation, strength in choices.distortions:
        image = distort(image, operation, strength)
    for what, factor in choices.jitter:
        image = _jittered(image, what, factor)
    if choices.grey:
        from torchvision.transforms.v2.functional import rgb_to_grayscale  # see _jittered

        image = rgb_to_grayscale(image, num_output_channels=3)
    return image


def _draw_jitter(
    strength: tuple[float, float, float, float], generator: np.random.Generator
) -> tuple[tuple[str, float], ...]:
    draws = generator.random(8).tolist()
    factors = [(1 - min(s, 1)) + draw * (s + min(s, 1)) for s, draw in zip(strength[:3], draws[:3], strict=True)]
    named = list(zip(("brightness", "contrast", "saturation"), factors, strict=True))
    named.append(("hue", strength[3] * (2 * draws[3] - 1)))
    in_order = sorted(range(4), key=lambda which: draws[4 + which])
    return tuple(named[which] for which in in_order if strength[which] > 0)


def _jittered(image: Tensor, what: str, factor: float) -> Tensor:
    # torchvision costs seconds to import, and a plain crop and flip does without it.
    from torchvision.transforms.v2 import functional as change

    result: Tensor = getattr(change, f"adjust_{what}")(image, factor)
    return result
