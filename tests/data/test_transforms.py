"""Preprocessing equals open_clip's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from vlkit.data.decode import decode_image, image_to_tensor
from vlkit.data.resizing import resize
from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError

SIZES = [(341, 256), (256, 341), (64, 64), (31, 47), (500, 100), (90, 400), (33, 64), (129, 64), (224, 224), (7, 5)]


@pytest.fixture(scope="module")
def open_clip_transform() -> Any:
    """open_clip's own transform without the normalisation, as uint8."""
    from vlkit.models.catalogue import open_clip_part

    transform = open_clip_part("transform")

    def make(**settings: Any) -> Any:
        steps = transform.image_transform_v2(transform.PreprocessCfg(**settings), is_train=False).transforms[:-1]

        def apply(image: Image.Image) -> Tensor:
            for step in steps:
                image = step(image)
            return (image * 255).round().to(torch.uint8)  # type: ignore[operator]

        return apply

    return make


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [32, 224])
def test_equals_open_clip(
    open_clip_transform: Any,
    size: int,
    resize_mode: Any,
    interpolation: Any,
    textured: Callable[[int, int], Image.Image],
) -> None:
    settings = {"size": size, "resize_mode": resize_mode, "interpolation": interpolation, "fill_color": 9}
    preprocess, theirs = Preprocess(**settings), open_clip_transform(**settings)
    for width, height in SIZES:
        image = textured(width, height)
        expected, pixels = theirs(image), image_to_tensor(image)
        assert torch.equal(preprocess.with_pillow(pixels), expected), (width, height)
        difference = (preprocess(pixels).int() - expected.int()).abs()
        assert difference.max() <= 2 and (difference > 1).float().mean() <= 1e-4, (width, height)


@pytest.mark.parametrize(
    "pattern",
    ["coco_small/val2017/*.jpg", "flickr8k_aspect/images/*.jpg", "caltech101/*/*.jpg", "cifar10_test/*/*.png"],
)
def test_equals_open_clip_on_real_images(open_clip_transform: Any, vlkit_data: Path, pattern: str) -> None:
    paths = sorted(vlkit_data.glob(pattern))
    preprocess, theirs = Preprocess(size=224), open_clip_transform(size=224)
    more_than_one = values = 0
    for path in paths[:: max(len(paths) // 25, 1)]:
        expected = theirs(Image.open(path))
        pixels = decode_image(path.read_bytes(), where=path.name, exif="ignore")
        assert torch.equal(preprocess.with_pillow(pixels), expected), path
        difference = (preprocess(pixels).int() - expected.int()).abs()
        assert difference.max() <= 2, path
        more_than_one += int((difference > 1).sum())
        values += difference.numel()
    assert more_than_one <= 1e-5 * values


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (3, 2)])
def test_extreme_shapes(width: int, height: int, resize_mode: Any) -> None:
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    square = Preprocess(size=64, resize_mode=resize_mode)(image)
    assert square.shape == (3, 64, 64) and square.is_contiguous()
    assert square[:, 31, 31].tolist() == [77, 77, 77]


def test_preprocess_record_round_trip() -> None:
    record = {
        "size": [224, 224],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": 0.25,
        "interpolation": "random",
        "resize_mode": "squash",
        "fill_color": 3,
    }
    preprocess = Preprocess.from_open_clip(record)
    assert preprocess == Preprocess(224, "squash", "bicubic", 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert Preprocess.from_open_clip(preprocess.to_open_clip()) == preprocess
    assert Preprocess.from_open_clip({}) == Preprocess()
    assert set(Preprocess().to_open_clip()) == set(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"resize_mod": "squash"}, r"Unknown preprocessing key 'resize_mod'. Did you mean resize_mode"),
        ({"resize_mode": "sqash"}, r"resize_mode is 'sqash'.*Did you mean squash"),
        ({"interpolation": "lanczos"}, r"interpolation is 'lanczos'.*Valid: bicubic, bilinear"),
        ({"size": [224, 336]}, r"\(224, 336\) is not square"),
        ({"size": 0}, r"Image size is 0; expected .* at least 1"),
        ({"mode": "L"}, r"mode 'L' is not supported; expected 'RGB'"),
    ],
)
def test_preprocess_records_that_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_open_clip(record)


def test_resize_keeps_an_image_of_the_right_size(textured: Callable[[int, int], Image.Image]) -> None:
    image = image_to_tensor(textured(20, 30))
    assert torch.equal(resize(image, 30, 20, "bicubic"), image)
