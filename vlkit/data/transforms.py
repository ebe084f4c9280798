"""What happens to an image between decoding and the encoder: uint8 tensors in, square uint8 tensors out.

    preprocess = Preprocess(size=224)
    square = preprocess(decode_image(data, where="a.jpg"))                       # (3, 224, 224) uint8

For training see `Augment`. Normalisation by mean and std is left to the encoder, which receives uint8.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlkit.data.augment import Augment
from vlkit.data.resizing import Box, Interpolation, Resize, cut, pillow_resize, resize
from vlkit.errors import ConfigError, did_you_mean

__all__ = ["CLIP_MEAN", "CLIP_STD", "Augment", "Interpolation", "Preprocess", "resize"]

ResizeMode = Literal["shortest", "longest", "squash"]

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
        crop_pct: share of each side that is kept after resizing, cut out of the centre: 0.875 resizes to 256 for a
            `size` of 224. Below 1 for models of timm and transformers that ask for it, not with "longest".
        mean, std: a channel's, on the scale [0, 1]; kept here, applied by the encoder.
    """

    size: int = 224
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill_color: int = 0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        _require_size(self.size)
        _require_one_of("resize_mode", self.resize_mode, ("shortest", "longest", "squash"))
        _require_one_of("interpolation", self.interpolation, ("bicubic", "bilinear"))
        if not 0 < self.crop_pct <= 1 or (self.crop_pct < 1 and self.resize_mode == "longest"):
            raise ConfigError(f"crop_pct is {self.crop_pct}; expected (0, 1], and 1 where resize_mode is 'longest'.")

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 of any size to (3, size, size) uint8; see `resizing` for how near to open_clip's."""
        return self._squared(image, resize)

    def with_pillow(self, image: Tensor) -> Tensor:
        """The same with pillow's resize, several times slower: equal to open_clip's transform in every bit."""
        return self._squared(image, pillow_resize)

    def _squared(self, image: Tensor, resize: Resize) -> Tensor:
        size = self.size
        resized = int(size / self.crop_pct + 1e-6)  # timm rounds down
        if self.resize_mode == "squash":
            return _centre(resize(image, resized, resized, self.interpolation), size)
        if self.resize_mode == "longest":
            ratio = size / max(image.shape[1:])
            height, width = (max(round(side * ratio), 1) for side in image.shape[1:])
            return _pad(resize(image, height, width, self.interpolation), size, self.fill_color)
        image = _without_long_ends(image)
        height, width = image.shape[1:]
        short = min(height, width)
        return _centre(
            resize(image, int(resized * height / short), int(resized * width / short), self.interpolation), size
        )

    @classmethod
    def from_open_clip(cls, record: Mapping[str, Any]) -> "Preprocess":
        """Read open_clip's `preprocess_cfg` (of a model, a tag or an `open_clip_config.json`).

        Raises:
            ConfigError: an unknown key, or a value that is not supported (another mode than RGB, a size not square).
        """
        known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color", "crop_pct"}
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
        record = {"mode": "RGB"} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.crop_pct == 1:
            del record["crop_pct"]  # open_clip does not know it
        return record


def _centre(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[1:]
    return cut(image, Box(round((height - size) / 2), round((width - size) / 2), size, size)).contiguous()


def _pad(image: Tensor, size: int, fill: int) -> Tensor:
    height, width = image.shape[1:]
    square = torch.full((3, size, size), fill, dtype=torch.uint8)
    cut(square, Box((size - height) // 2, (size - width) // 2, height, width)).copy_(image)
    return square


def _without_long_ends(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) <= longest:
        return image
    box_height, box_width = min(height, longest), min(width, longest)
    return cut(image, Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width))


def _require_size(size: object) -> None:
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"Image size is {size!r}; expected a whole number of pixels, at least 1.")


def _require_one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}. {did_you_mean(value, valid)}")
