"""What happens to an image between decoding and the encoder: uint8 tensors in, square uint8 tensors out.

    preprocess = Preprocess(size=224)
    square = preprocess(decode_image(data, where="a.jpg"))                       # (3, 224, 224) uint8

    augment = Augment(crop_scale=(0.4, 1.0), hflip=0.5)
    square = augment.apply(image, 64, "bicubic", generator(seed, epoch, sample_id, "augment"))

Resizing uses torch's vectorised uint8 kernel, several times faster than pillow's resize. On photographs its result
differs from pillow's by at most 1 grey level, but for two or three values in a million, which differ by 2 (both
round between the two passes of the filter, torch with 15-bit weights). `Preprocess.with_pillow` is exact.
Normalisation by mean and std is left to the encoder, which receives uint8.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vlkit.data.decode import EncodedImage
from vlkit.data.rand_augment import RandAugment
from vlkit.errors import ConfigError, did_you_mean

ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
Resize = Callable[[Tensor, int, int, Interpolation], Tensor]

# Source: OpenAI CLIP; open_clip's OPENAI_DATASET_MEAN and OPENAI_DATASET_STD.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A strip one pixel high would be enlarged to gigabytes before its centre is cut out.
_MAX_ASPECT = 32


@dataclass(frozen=True)
class Preprocess:
    """How images are prepared for evaluation; part of the record of a model's weights.

    The choices and their arithmetic are open_clip's (`PreprocessCfg`, `image_transform_v2`), except that images are
    made RGB before they are resized (open_clip resizes palette images by nearest neighbour, since pillow does).

    Attributes:
        size: height and width of the result, in pixels.
        resize_mode: "shortest" resizes the shorter side to `size` and cuts out the centre; "longest" resizes the
            longer side and pads with `fill_color`; "squash" ignores the aspect ratio.
        interpolation: filter, antialiased.
        fill_color: grey level of the padding, 0..255.
        mean, std: a channel's, on the scale [0, 1]; kept here, applied by the encoder.
    """

    size: int = 224
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill_color: int = 0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        _require_size(self.size)
        _require_one_of("resize_mode", self.resize_mode, ("shortest", "longest", "squash"))
        _require_one_of("interpolation", self.interpolation, ("bicubic", "bilinear"))

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 of any size to (3, size, size) uint8."""
        return self._squared(image, resize)

    def with_pillow(self, image: Tensor) -> Tensor:
        """The same with pillow's resize, several times slower: equal to open_clip's transform in every bit."""
        return self._squared(image, _pillow_resize)

    def _squared(self, image: Tensor, resize: Resize) -> Tensor:
        size = self.size
        if self.resize_mode == "squash":
            return resize(image, size, size, self.interpolation).contiguous()
        if self.resize_mode == "longest":
            ratio = size / max(image.shape[1:])
            height, width = (max(round(side * ratio), 1) for side in image.shape[1:])
            return _pad(resize(image, height, width, self.interpolation), size, self.fill_color)
        image = _without_long_ends(image)
        height, width = image.shape[1:]
        short = min(height, width)
        image = resize(image, int(size * height / short), int(size * width / short), self.interpolation)
        height, width = image.shape[1:]
        return _cut(image, Box(round((height - size) / 2), round((width - size) / 2), size, size)).contiguous()

    @classmethod
    def from_open_clip(cls, record: Mapping[str, Any]) -> "Preprocess":
        """Read open_clip's `preprocess_cfg` (of a model, a tag or an `open_clip_config.json`).

        Raises:
            ConfigError: an unknown key, or a value that is not supported (another mode than RGB, a size not square).
        """
        known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
        for key in record:
            if key not in known:
                raise ConfigError(f"Unknown preprocessing key {key!r}. {did_you_mean(str(key), known)}")
        given = {key: value for key, value in record.items() if value is not None}
        if given.pop("mode", "RGB") != "RGB":
            raise ConfigError(f"Preprocessing mode {record['mode']!r} is not supported; expected 'RGB'.")
        if given.get("interpolation") == "random":
            given["interpolation"] = "bicubic"  # open_clip uses bicubic where nothing is random
        size = given.get("size", 224)
        if isinstance(size, (list, tuple)):
            if len(set(size)) != 1:
                raise ConfigError(f"Image size {tuple(size)} is not square; only square sizes are supported.")
            given["size"] = size[0]
        for key in ("mean", "std"):
            if key in given:
                value = given[key]
                given[key] = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
        return cls(**given)

    def to_open_clip(self) -> dict[str, Any]:
        """The same as open_clip's `preprocess_cfg`; `from_open_clip` reads it back."""
        return {"mode": "RGB"} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def shrunk(self, shrink: int, height: int, width: int) -> "Box":
        """The same region of the image decoded at 1/shrink, whose size is height x width."""
        box_height = min(max(round(self.height / shrink), 1), height)
        box_width = min(max(round(self.width / shrink), 1), width)
        top = min(round(self.top / shrink), height - box_height)
        return Box(top, min(round(self.left / shrink), width - box_width), box_height, box_width)


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image; every one is drawn from the generator passed in, in a fixed order.

    The defaults are open_clip's: a random crop of 90-100% of the area and nothing else.

    Attributes:
        crop_scale: smallest and largest share of the image's area that the crop covers.
        crop_ratio: smallest and largest width / height of the crop.
        hflip: probability of mirroring. Captions that say left or right then lie.
        color_jitter: strength of brightness, contrast, saturation and hue (hue at most 0.5), or None.
        color_jitter_probability: how often `color_jitter` is applied.
        grayscale: probability of removing the colour.
        rand_augment: RandAugment's number of operations and magnitude, or None.

    Source: random resized crop as in Szegedy et al. 2014, arXiv:1409.4842, in torchvision's form.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    color_jitter: tuple[float, float, float, float] | None = None
    color_jitter_probability: float = 1.0
    grayscale: float = 0.0
    rand_augment: RandAugment | None = None

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_scale is {self.crop_scale}; expected 0 < smallest <= largest <= 1.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ConfigError(f"crop_ratio is {self.crop_ratio}; expected 0 < smallest <= largest.")
        for name in ("hflip", "color_jitter_probability", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a probability lies in [0, 1].")
        if self.color_jitter and (min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5):
            raise ConfigError(f"color_jitter is {self.color_jitter}; expected four numbers >= 0, the last <= 0.5.")

    def apply(self, image: Tensor, size: int, interpolation: Interpolation, generator: np.random.Generator) -> Tensor:
        """(3, H, W) uint8 of any size to (3, size, size) uint8."""
        box = self.draw_box(image.shape[1], image.shape[2], generator)
        return self._finish(_cut(image, box), size, interpolation, generator)

    def decode(
        self, image: EncodedImage, size: int, interpolation: Interpolation, generator: np.random.Generator
    ) -> Tensor:
        """Decode and augment: as `apply`, but a JPEG is decoded no larger than the crop needs.

        Raises:
            BrokenImageError: the image is truncated or corrupt.
        """
        box = self.draw_box(image.height, image.width, generator)
        shrink = image.shrink_for(box.height, box.width, size)
        pixels = image.decode(shrink)
        if shrink > 1:
            box = box.shrunk(shrink, pixels.shape[1], pixels.shape[2])
        return self._finish(_cut(pixels, box), size, interpolation, generator)

    def draw_box(self, height: int, width: int, generator: np.random.Generator) -> Box:
        """A random part of an image; its centre, as far as the ratio allows, when ten attempts do not fit."""
        draws = generator.random(22).tolist()
        low, high = self.crop_scale
        log_low, log_high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for scale, ratio in zip(draws[0:20:2], draws[1:20:2], strict=True):
            area = height * width * (low + (high - low) * scale)
            aspect = math.exp(log_low + (log_high - log_low) * ratio)
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                top, left = int(draws[20] * (height - box_height + 1)), int(draws[21] * (width - box_width + 1))
                return Box(top, left, box_height, box_width)
        aspect = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
        box_width, box_height = max(box_width, 1), max(box_height, 1)
        return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)

    def _finish(self, image: Tensor, size: int, interpolation: Interpolation, generator: np.random.Generator) -> Tensor:
        image = _interpolate(image, size, size, interpolation)
        if self.hflip and generator.random() < self.hflip:
            image = image.flip(2)
        if self.rand_augment is not None:
            image = self.rand_augment.apply(image, generator)
        if self.color_jitter and generator.random() < self.color_jitter_probability:
            image = _jitter(image, self.color_jitter, generator)
        if self.grayscale and generator.random() < self.grayscale:
            from torchvision.transforms.v2.functional import rgb_to_grayscale

            image = rgb_to_grayscale(image, num_output_channels=3)
        return image.contiguous()


def resize(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """(3, H, W) uint8 to (3, height, width) uint8, antialiased, as pillow 13 resizes."""
    old_height, old_width = image.shape[1:]
    # The kernel filters rows first and rounds in between. Pillow 13 filters columns first when the height shrinks by
    # far more pixels than the width; with the aspect ratio kept, on pictures taller than twice their width.
    if height < old_height and old_height - height > 2 * (old_width - width):
        image = _interpolate(image, height, old_width, interpolation)
    return _interpolate(image, height, width, interpolation)


def _interpolate(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return functional.interpolate(image[None], size=(height, width), mode=interpolation, antialias=True)[0]


def _pillow_resize(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    resample = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), resample)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _cut(image: Tensor, box: Box) -> Tensor:
    return image[:, box.top : box.top + box.height, box.left : box.left + box.width]


def _pad(image: Tensor, size: int, fill: int) -> Tensor:
    height, width = image.shape[1:]
    square = torch.full((3, size, size), fill, dtype=torch.uint8)
    _cut(square, Box((size - height) // 2, (size - width) // 2, height, width)).copy_(image)
    return square


def _without_long_ends(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) <= longest:
        return image
    box_height, box_width = min(height, longest), min(width, longest)
    return _cut(image, Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width))


def _jitter(image: Tensor, strength: tuple[float, float, float, float], generator: np.random.Generator) -> Tensor:
    # torchvision costs seconds to import, and a plain crop and flip does without it.
    from torchvision.transforms.v2 import functional as change

    factors = generator.uniform([max(0.0, 1 - s) for s in strength[:3]], [1 + s for s in strength[:3]]).tolist()
    hue = generator.uniform(-strength[3], strength[3])
    for which in generator.permutation(4).tolist():
        if strength[which] == 0:
            continue
        if which == 0:
            image = change.adjust_brightness(image, factors[0])
        elif which == 1:
            image = change.adjust_contrast(image, factors[1])
        elif which == 2:
            image = change.adjust_saturation(image, factors[2])
        else:
            image = change.adjust_hue(image, hue)
    return image


def _require_size(size: object) -> None:
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"Image size is {size!r}; expected a whole number of pixels, at least 1.")


def _require_one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}. {did_you_mean(value, valid)}")
