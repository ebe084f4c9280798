"""RandAugment's operations equal torchvision's; its choices come from the generator."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from vlkit.data.augment import Augment
from vlkit.data.rand_augment import MAX_MAGNITUDE, OPERATIONS, RandAugment, distort
from vlkit.data.randomness import generator
from vlkit.errors import ConfigError


@pytest.fixture(scope="module")
def image() -> Tensor:
    y, x = np.mgrid[0:48, 0:64].astype(float)
    pixels = np.stack([4 * x, 5 * y, 127 + 100 * np.sin(x / 4)])
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [4, 9, 30])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_equal_torchvisions(image: Tensor, operation: str, magnitude: int, sign: int) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment as Theirs

    name = operation.title().replace("_", "")
    magnitudes, signed = Theirs._AUGMENTATION_SPACE[name]
    values = magnitudes(MAX_MAGNITUDE + 1, *image.shape[1:])
    value = 0.0 if values is None else float(values[magnitude]) * (sign if signed else 1)
    expected = Theirs()._apply_image_or_video_transform(image, name, value, InterpolationMode.NEAREST, {})
    ours = distort(image, operation, sign * magnitude / MAX_MAGNITUDE)
    # Factors go through 32-bit floats there, so that a rounding may tip over.
    assert ((ours.int() - expected.int()).abs() > 1).float().mean() < 0.005


def test_every_operation_is_drawn_equally_often() -> None:
    counts: Counter[str] = Counter()
    for sample in range(3000):
        draws = generator(0, 0, sample, "augment").random((2, 2))
        counts.update(OPERATIONS[int(draw * len(OPERATIONS))] for draw in draws[:, 0])
    assert set(counts) == set(OPERATIONS)
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_depends_on_the_generator_only(image: Tensor) -> None:
    augment = RandAugment(num_ops=3, magnitude=20)
    first = [augment.apply(image, generator(0, 0, sample, "augment")) for sample in range(10)]
    again = [augment.apply(image, generator(0, 0, sample, "augment")) for sample in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(not torch.equal(a, image) for a in first) >= 9
    assert all(a.shape == image.shape and a.dtype == torch.uint8 for a in first)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(
        ConfigError, match=r"num_ops 2 and magnitude 31; expected num_ops >= 1 and magnitude in 0\.\.30"
    ):
        RandAugment(2, 31)


def test_the_run_file_reaches_it() -> None:
    from vlkit.config import AugmentSettings
    from vlkit.training.assemble import make_augment

    settings = AugmentSettings.model_validate({"rand_augment": {"num_ops": 3, "magnitude": 5}, "dct_scale": 1})
    augment = make_augment(settings)
    assert augment is not None and augment.rand_augment == RandAugment(3, 5) and augment.dct_scale == 1
    assert make_augment(AugmentSettings()) == Augment() and make_augment(None) is None
