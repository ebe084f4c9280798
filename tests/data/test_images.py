"""Reading images in order for evaluation."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlkit.data.decode import decode_image, image_to_tensor
from vlkit.data.images import ImageLike, iterate_images, read_image
from vlkit.data.records import ImageRef, Record
from vlkit.data.transforms import Preprocess
from vlkit.errors import DataError

PREPROCESS = Preprocess(size=16)


def colour(number: int) -> tuple[int, int, int]:
    return (number * 11 % 256, number * 5 % 256, 255 - number)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(30):
        Image.new("RGB", (20 + number, 24), colour(number)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"no image")
    (tmp_path / "19.png").write_bytes((tmp_path / "18.png").read_bytes()[:60])
    return tmp_path


def items(folder: Path) -> list[ImageLike]:
    """30 images as paths, strings, records (a file, bytes, a range of a file) and pillow images; 4 are broken."""
    result: list[ImageLike] = []
    for number in range(30):
        path = folder / f"{number:02}.png"
        data = path.read_bytes()
        if number == 12:
            result.append(folder / "missing.png")
        elif number == 25:
            result.append(Record("cut", ImageRef(path=str(path), offset=0, size=10_000)))
        elif number in (7, 19) or number % 5 == 0:
            result.append(path)
        elif number % 5 == 1:
            result.append(str(path))
        elif number % 5 == 2:
            result.append(Record(f"key {number}", ImageRef(data=data)))
        elif number % 5 == 3:
            result.append(Record(f"key {number}", ImageRef(path=str(path), offset=0, size=len(data))))
        else:
            result.append(Image.open(io.BytesIO(data)))
    return result


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_images_come_in_order_and_broken_ones_are_named(folder: Path, workers: int, batch_size: int) -> None:
    chunks = list(iterate_images(items(folder), PREPROCESS, batch_size=batch_size, workers=workers))
    rows = [row for chunk in chunks for row in chunk.rows]
    failures = dict(failure for chunk in chunks for failure in chunk.failures)
    assert rows == [row for row in range(30) if row not in (7, 12, 19, 25)]
    assert sorted(failures) == [7, 12, 19, 25]
    assert "07.png is not an image" in failures[7]
    assert "missing.png: No such file" in failures[12]
    assert "19.png is truncated" in failures[19]
    assert "the file was cut" in failures[25]
    images = torch.cat([chunk.images for chunk in chunks])
    assert images.shape == (26, 3, 16, 16) and images.dtype == torch.uint8
    assert [tuple(image[:, 0, 0].tolist()) for image in images] == [colour(row) for row in rows]
    assert [len(chunk.rows) + len(chunk.failures) for chunk in chunks[:-1]] == [batch_size] * (len(chunks) - 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_images(workers: int) -> None:
    assert list(iterate_images([], PREPROCESS, batch_size=4, workers=workers)) == []


def test_a_chunk_of_broken_images_is_empty() -> None:
    (chunk,) = iterate_images([Record("a", ImageRef(data=b"")), "nowhere.jpg"], PREPROCESS, batch_size=4)
    assert chunk.rows == [] and chunk.images.shape == (0, 3, 16, 16) and len(chunk.failures) == 2


def test_stopping_early_leaves_nothing_behind(folder: Path) -> None:
    chunks = iterate_images([folder / "01.png"] * 1000, PREPROCESS, batch_size=4, workers=2)
    assert next(chunks).rows == [0, 1, 2, 3]
    chunks.close()  # type: ignore[attr-defined]


def test_reference_is_pillow_all_the_way(vlkit_data: Path) -> None:
    path = sorted(vlkit_data.glob("coco_small/val2017/*.jpg"))[3]
    (chunk,) = iterate_images([path], Preprocess(size=64), batch_size=1, reference=True)
    image = Image.open(path).convert("RGB")
    width, height = image.size
    assert width > height
    resized = image.resize((int(64 * width / height), 64), Image.Resampling.BICUBIC)
    left = round((resized.width - 64) / 2)
    assert torch.equal(chunk.images[0], image_to_tensor(resized.crop((left, 0, left + 64, 64))))


def test_exif_and_pixel_limit_are_passed_on(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 40, 20)
    assert read_image(tmp_path / "turned.jpg", exif="ignore").shape == (3, 20, 40)
    with pytest.raises(DataError, match="limit of 100"):
        read_image(tmp_path / "turned.jpg", max_pixels=100)
    (chunk,) = iterate_images([tmp_path / "turned.jpg"], PREPROCESS, batch_size=1, max_pixels=100)
    assert "limit of 100" in chunk.failures[0][1]


def test_decode_and_read_agree(folder: Path) -> None:
    path = folder / "03.png"
    assert torch.equal(read_image(path), decode_image(path.read_bytes(), where="x"))
