"""RandAugment: a few random distortions of a training image, all of one strength.

Torchvision's class of that name draws from torch's global generator; here every choice comes from the generator
passed in, so that a sample's pixels depend on nothing but its seed, epoch and number. The operations and their
ranges are torchvision's.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vlkit.errors import ConfigError

MAX_MAGNITUDE = 30

Distortion = tuple[str, float]  # an operation and its strength in [-1, 1]

# The number of an operation is what is drawn: do not reorder.
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)


@dataclass(frozen=True)
class RandAugment:
    """Apply `num_ops` operations drawn with replacement, each at `magnitude` (0..30).

    Source: Cubuk et al. 2019, "RandAugment: Practical automated data augmentation with a reduced search space",
        arXiv:1909.13719; ranges of torchvision.transforms.v2.RandAugment with 31 bins.
    """

    num_ops: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.num_ops < 1 or not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ConfigError(
                f"rand_augment has num_ops {self.num_ops} and magnitude {self.magnitude}; "
                f"expected num_ops >= 1 and magnitude in 0..{MAX_MAGNITUDE}."
            )

    def apply(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """(3, H, W) uint8 to the same shape; what moves in from outside is black."""
        for operation, strength in self.draw(generator):
            image = distort(image, operation, strength)
        return image

    def draw(self, generator: np.random.Generator) -> tuple[Distortion, ...]:
        """Which operations, and how strong: what `distort` takes."""
        strength = self.magnitude / MAX_MAGNITUDE
        return tuple(
            (OPERATIONS[int(draw * len(OPERATIONS))], -strength if sign < 0.5 else strength)
            for draw, sign in generator.random((self.num_ops, 2)).tolist()
        )


def distort(image: Tensor, operation: str, strength: float) -> Tensor:
    """Apply one of `OPERATIONS` to (3, H, W) uint8.

    Args:
        image: the image.
        operation: its name.
        strength: in [-1, 1]; the sign is the direction, which posterize, solarize and the last two do not have.
    """
    # torchvision costs seconds to import, and most runs do without RandAugment.
    from torchvision.transforms.v2 import functional as change

    result: Tensor
    match operation:
        case "identity":
            result = image
        case "shear_x" | "shear_y" | "translate_x" | "translate_y":
            result = change.affine(image, angle=0.0, scale=1.0, **_moved(image, operation, strength))
        case "rotate":
            result = change.rotate(image, angle=30.0 * strength)
        case "brightness":
            result = change.adjust_brightness(image, 1 + 0.9 * strength)
        case "color":
            result = change.adjust_saturation(image, 1 + 0.9 * strength)
        case "contrast":
            result = change.adjust_contrast(image, 1 + 0.9 * strength)
        case "sharpness":
            result = change.adjust_sharpness(image, 1 + 0.9 * strength)
        case "posterize":
            result = change.posterize(image, 8 - round(4 * abs(strength)))
        case "solarize":
            result = change.solarize(image, 255 * (1 - abs(strength)))
        case "auto_contrast":
            result = change.autocontrast(image)
        case "equalize":
            result = change.equalize(image)
        case _:
            raise AssertionError(operation)
    return result


def _moved(image: Tensor, operation: str, strength: float) -> dict[str, Any]:
    """The affine map's arguments; shearing turns around the corner, as in the paper's implementation."""
    degrees = math.degrees(math.atan(0.3 * strength))
    height, width = image.shape[1:]
    return {
        "shear_x": {"translate": [0, 0], "shear": [degrees, 0.0], "center": [0.0, 0.0]},
        "shear_y": {"translate": [0, 0], "shear": [0.0, degrees], "center": [0.0, 0.0]},
        "translate_x": {"translate": [int(150 / 331 * width * strength), 0], "shear": [0.0, 0.0]},
        "translate_y": {"translate": [0, int(150 / 331 * height * strength)], "shear": [0.0, 0.0]},
    }[operation]
