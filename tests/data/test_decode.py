"""Bytes to pixels: every kind of image people have, compared with pillow, and every kind that is broken."""

import io
import pickle
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.nn import functional

from vlkit.data.decode import MAX_PIXELS, BrokenImageError, decode_image, image_to_tensor, open_image
from vlkit.errors import DataError


def photo_like(width: int = 61, height: int = 43) -> Image.Image:
    """Smooth colours with some texture and an edge, different in every corner."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    red, green = 255 * x / width, 255 * y / height
    blue = 127 + 100 * np.sin(x / 3) * np.cos(y / 5)
    pixels = np.stack([red, green, blue], 2)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 30)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_array(image: Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def pillow_rgb(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palette transparency given as bytes
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def with_alpha(mode: str) -> Image.Image:
    image = photo_like().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def palette(transparency: bytes | int | None) -> bytes:
    image = photo_like().quantize(16)
    return encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(photo_like(), "JPEG", quality=90),
    "jpeg 4:4:4": lambda: encoded(photo_like(), "JPEG", subsampling=0),
    "jpeg progressive": lambda: encoded(photo_like(), "JPEG", progressive=True),
    "jpeg stored as RGB": lambda: encoded(photo_like(), "JPEG", keep_rgb=True),
    "jpeg grey": lambda: encoded(photo_like().convert("L"), "JPEG"),
    "jpeg CMYK, Adobe inverted": lambda: encoded(photo_like().convert("CMYK"), "JPEG"),
    "jpeg one pixel": lambda: encoded(photo_like(1, 1), "JPEG"),
    "mpo": lambda: encoded(photo_like(), "MPO", save_all=True, append_images=[photo_like().rotate(180)]),
    "png": lambda: encoded(photo_like(), "PNG"),
    "png grey": lambda: encoded(photo_like().convert("L"), "PNG"),
    "png one bit": lambda: encoded(photo_like().convert("1"), "PNG"),
    "png palette": lambda: palette(None),
    "png palette, one colour transparent": lambda: palette(3),
    "png palette, transparency as bytes": lambda: palette(bytes(range(0, 160, 10))),
    "png with alpha": lambda: encoded(with_alpha("RGB"), "PNG"),
    "png grey with alpha": lambda: encoded(with_alpha("L"), "PNG"),
    "webp": lambda: encoded(photo_like(), "WEBP"),
    "webp with alpha": lambda: encoded(with_alpha("RGB"), "WEBP", lossless=True),
    "gif": lambda: encoded(photo_like(), "GIF"),
    "gif, first of two frames": lambda: encoded(
        photo_like(), "GIF", save_all=True, append_images=[photo_like().rotate(180)]
    ),
    "bmp": lambda: encoded(photo_like(), "BMP"),
    "tiff": lambda: encoded(photo_like(), "TIFF"),
    "tiff CMYK": lambda: encoded(photo_like().convert("CMYK"), "TIFF"),
    "ppm": lambda: encoded(photo_like(), "PPM"),
}
if features.check("avif"):
    KINDS["avif"] = lambda: encoded(photo_like(), "AVIF")


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_those_of_pillow(kind: str) -> None:
    data = KINDS[kind]()
    assert np.array_equal(as_array(decode_image(data, where=kind)), pillow_rgb(data))
    assert np.array_equal(as_array(decode_image(data, where=kind, reference=True)), pillow_rgb(data))
    opened = open_image(data, where=kind)
    assert (opened.height, opened.width) == pillow_rgb(data).shape[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pillow_image_gives_the_same_pixels_and_is_not_changed(kind: str) -> None:
    data = KINDS[kind]()
    image = Image.open(io.BytesIO(data))
    image.load()
    before = (image.mode, dict(image.info))
    assert np.array_equal(as_array(image_to_tensor(image)), pillow_rgb(data))
    assert (image.mode, dict(image.info)) == before


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 8).astype(np.uint16).reshape(8, 64)
    data = encoded(Image.fromarray(values), "PNG")
    decoded = as_array(decode_image(data, where="x"))
    assert np.abs(decoded.astype(int) - (values / 257)[:, :, None]).max() <= 1
    assert np.array_equal(as_array(image_to_tensor(Image.open(io.BytesIO(data)))), decoded)


def test_16_bit_colour_is_scaled() -> None:
    values = np.linspace(0, 65535, 8 * 8 * 3).astype(">u2").reshape(8, 8, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = png(struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), zlib.compress(rows))
    decoded = as_array(decode_image(data, where="x"))
    assert np.abs(decoded.astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo_like(), kind, exif=exif)
    turned = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    for reference in (False, True):
        assert np.array_equal(as_array(decode_image(data, where="x", reference=reference)), turned)
        stored = decode_image(data, where="x", exif="ignore", reference=reference)
        assert np.array_equal(as_array(stored), pillow_rgb(data))
    assert np.array_equal(as_array(image_to_tensor(Image.open(io.BytesIO(data)))), turned)
    opened = open_image(data, where="x")
    assert (opened.height, opened.width) == turned.shape[:2]


def test_exif_quarter_turn_by_hand() -> None:
    """Orientation 6: the stored top left corner is shown top right."""
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = decode_image(encoded(image, "JPEG", exif=exif), where="x")
    assert shown.shape == (3, 64, 32)
    assert shown[:, :12, 20:].min() > 240 and shown[:, 20:].max() < 15


def test_broken_exif_leaves_the_image_as_stored() -> None:
    data = encoded(photo_like(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode_image(data, where="x").shape == (3, 43, 61)


@pytest.mark.parametrize("reference", [False, True])
def test_jpegs_cut_anywhere_are_broken_exactly_when_pillow_says_so(reference: bool) -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = encoded(photo_like(120, 90), "JPEG", **options)
        for length in [*range(2, len(data), 97), len(data) - 3, len(data) - 2, len(data) - 1]:
            try:
                expected: np.ndarray | None = pillow_rgb(data[:length])
            except Exception:  # pillow raises a dozen types on broken data; both outcomes are asserted below
                expected = None
            if expected is None:
                with pytest.raises(BrokenImageError, match=r"shard 1, sample 7"):
                    decode_image(data[:length], where="shard 1, sample 7", reference=reference)
            else:
                decoded = as_array(decode_image(data[:length], where="x", reference=reference))
                assert np.array_equal(decoded, expected)


def test_a_jpeg_cut_in_half_says_so() -> None:
    data = encoded(photo_like(300, 200), "JPEG")
    with pytest.raises(BrokenImageError, match=r"a\.jpg is truncated and cannot be decoded.*Replace it") as caught:
        decode_image(data[: len(data) // 2], where="a.jpg")
    assert caught.value.cause == "truncated"
    again = pickle.loads(pickle.dumps(caught.value))  # it travels from worker processes
    assert (again.cause, str(again)) == (caught.value.cause, str(caught.value))


def test_a_png_cut_in_half_is_truncated() -> None:
    data = encoded(photo_like(300, 200), "PNG")
    with pytest.raises(BrokenImageError) as caught:
        decode_image(data[: len(data) // 2], where="a.png")
    assert caught.value.cause == "truncated"


@pytest.mark.parametrize(
    ("data", "found"), [(b"", "an empty file"), (b"<html>404</html>", "16 bytes that open with b'<html>40'")]
)
def test_no_image_at_all(data: bytes, found: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jpg is not an image: found {found}, expected JPEG.*Replace") as caught:
        decode_image(data, where="a.jpg")
    assert isinstance(caught.value, BrokenImageError) and caught.value.cause == "not an image"


def test_postscript_is_not_run() -> None:
    with pytest.raises(BrokenImageError, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", where="a.eps")


def png(header: bytes, pixels: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def huge_png(side: int) -> bytes:
    return png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(bytes(10_000)))


def huge_jpeg(side: int) -> bytes:
    data = bytearray(encoded(photo_like(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("data", [huge_png(20_000), huge_jpeg(20_000)], ids=["png", "jpeg"])
@pytest.mark.parametrize("reference", [False, True])
def test_20_000_x_20_000_pixels_are_refused_by_the_header(data: bytes, reference: bool) -> None:
    with pytest.raises(BrokenImageError, match=r"big\.png has .*pixels") as caught:
        decode_image(data, where="big.png", reference=reference)
    assert caught.value.cause == "too many pixels"


def test_the_pixel_limit_can_be_set() -> None:
    data = encoded(photo_like(60, 40), "JPEG")
    assert decode_image(data, where="x", max_pixels=2400).shape == (3, 40, 60)
    with pytest.raises(BrokenImageError, match=r"60 x 40 = 2,400 pixels.*limit of 2,399.*make it smaller"):
        decode_image(data, where="x", max_pixels=2399)
    assert MAX_PIXELS < 10_000**2


def test_a_text_chunk_that_unpacks_to_a_gigabyte_is_refused() -> None:
    bomb = b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    with pytest.raises(BrokenImageError):
        decode_image(
            png(struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0), zlib.compress(bytes(200)), (b"zTXt", bomb)), where="x"
        )


def test_heic_names_the_extra_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    data = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(BrokenImageError, match=r"a\.heic is a HEIC image.*pip install 'vlkit\[heif\]'"):
        decode_image(data, where="a.heic")


def test_heic_is_read_where_the_extra_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photo_like(64, 48)).save(buffer, quality=95)
    decoded = as_array(decode_image(buffer.getvalue(), where="a.heic"))
    assert decoded.shape == (48, 64, 3)
    assert np.abs(decoded.astype(int) - np.array(photo_like(64, 48))).mean() < 8


@pytest.mark.parametrize(
    "pixels", [np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)], ids=["float", "32-bit"]
)
def test_pixels_without_a_range_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(BrokenImageError, match=r"whose range is not defined.*8 or 16 bits") as caught:
        decode_image(encoded(Image.fromarray(pixels), "TIFF"), where="x")
    assert caught.value.cause == "unsupported pixel type"


def test_min_size_shrinks_jpegs_to_no_less_than_twice_the_target() -> None:
    data = encoded(photo_like(1000, 700), "JPEG")
    for target, height in ((400, 700), (175, 350), (88, 350), (87, 175), (44, 175), (43, 88), (10, 88)):
        assert decode_image(data, where="x", min_size=target).shape[1] == height
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo_like(1000, 700), "JPEG", exif=exif)
    assert decode_image(turned, where="x", min_size=100).shape == (3, 500, 350)
    assert decode_image(encoded(photo_like(1000, 700), "PNG"), where="x", min_size=10).shape == (3, 700, 1000)


def test_random_damage_raises_nothing_else() -> None:
    """Flipped and missing bytes in every format: a picture or a BrokenImageError."""
    random = np.random.default_rng(0)
    broken = 0
    for kind in ("jpeg", "jpeg progressive", "png", "webp", "gif", "bmp", "tiff", "png palette"):
        data = KINDS[kind]()
        for _ in range(40):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 12)):
                damaged[place] = random.integers(256)
            if random.random() < 0.3:
                del damaged[random.integers(1, len(damaged)) :]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pillow's remarks about damaged metadata
                try:
                    assert decode_image(bytes(damaged), where="x").shape[0] == 3
                except BrokenImageError:
                    broken += 1
    assert broken > 50


@pytest.mark.parametrize("pattern", ["coco_small/val2017/*.jpg", "caltech101/*/*.jpg", "noto_emoji/images/*.png"])
def test_real_images_equal_pillow(vlkit_data: Path, pattern: str) -> None:
    paths = sorted(vlkit_data.glob(pattern))
    for path in paths[:: max(len(paths) // 40, 1)]:
        data = path.read_bytes()
        assert np.array_equal(as_array(decode_image(data, where=path.name, exif="ignore")), pillow_rgb(data)), path


def test_shrunk_decoding_hardly_changes_photographs(vlkit_data: Path) -> None:
    compared = 0
    for path in sorted(vlkit_data.glob("coco_small/val2017/*.jpg"))[::5]:
        image = open_image(path.read_bytes(), where=path.name)
        shrink = image.shrink_for(image.height, image.width, 100)
        if shrink == 1 or image.height % shrink or image.width % shrink:
            continue
        full, shrunk = (
            functional.interpolate(image.decode(by)[None], size=(100, 100), mode="bicubic", antialias=True).int()
            for by in (1, shrink)
        )
        assert (full - shrunk).abs().float().mean() < 1, path
        compared += 1
    assert compared > 10
