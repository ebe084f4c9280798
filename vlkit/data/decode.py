"""Encoded image bytes to a uint8 RGB tensor.

JPEG goes through simplejpeg (libjpeg-turbo, the same pixels as pillow, half the time), everything else and
every JPEG that simplejpeg refuses through pillow, so whether an image counts as broken is pillow's word alone.
The number of pixels is read from the header and checked before anything is decoded.

    image = decode_image(Path("a.jpg").read_bytes(), where="a.jpg")   # (3, H, W) uint8

Rules, chosen so that pixels equal those of pillow's `.convert("RGB")`, which open_clip and its peers use:
alpha and palette transparency are dropped, grey is repeated, CMYK is converted naively, of an animation the first
frame counts. Differs: 16-bit grey is scaled to 8 bits (pillow clips it to white), as pillow does with 16-bit colour.
"""

import io
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlkit.errors import DataError

Exif = Literal["apply", "ignore"]

# Pillow's own threshold for a decompression bomb: 268 MB as RGB.
MAX_PIXELS = 89_478_485

# Named, because pillow would otherwise also try EPS (which starts ghostscript) and other exotic readers.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_ORIENTATION = 0x0112


class BrokenImageError(DataError):
    """An image that cannot be decoded; `cause` is one of a few words, so that causes can be counted."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["BrokenImageError"], tuple[str, str]]:
        return BrokenImageError, (str(self), self.cause)


@dataclass
class EncodedImage:
    """An image whose header has been read, not its pixels.

    `height` and `width` are those of the decoded image in full size, with the EXIF rotation if it is applied.
    """

    data: bytes
    where: str
    height: int
    width: int
    orientation: int  # EXIF 1..8 still to be applied after decoding
    fast: bool  # simplejpeg can decode it

    def shrink_for(self, height: float, width: float, target: int, margin: int = 2) -> int:
        """The strongest shrinking that leaves a region (height x width of the full image) `margin` times `target` wide
        and high.

        With a margin of 2 the difference after the resize is 0.4 grey levels on average (COCO photographs). With a
        margin of 1 the DCT replaces part of the resize filter: to 224 pixels 1.5 grey levels on average from
        1024x768, 3 from 640x480, up to 7 where the region is small, and over 100 on single sharp edges.
        Where a side is not a multiple of the shrinking, the last shrunk row stands for less than a full one, which
        shifts pixels there by up to a quarter.
        Only 1/2, 1/4 and 1/8: libjpeg-turbo's other fractions are slower than decoding in full.
        """
        for shrink in (8, 4, 2):
            if self.fast and min(height, width) >= margin * target * shrink:
                return shrink
        return 1

    def decode(self, shrink: int = 1) -> Tensor:
        """The pixels, at 1/shrink of the full size for JPEG (sizes rounded up) and in full size otherwise.

        Returns:
            (3, H, W) uint8 RGB; usually a view of H x W x 3 memory, the layout the resize kernel is fastest on.

        Raises:
            BrokenImageError: truncated or corrupt.
        """
        if self.fast:
            try:
                pixels = simplejpeg.decode_jpeg(self.data, "RGB", **self._scaling(shrink))
            except ValueError:
                pixels = _pillow_pixels(self.data, self.where)  # pillow decides whether it is broken
        else:
            pixels = _pillow_pixels(self.data, self.where)
        return _oriented(torch.from_numpy(pixels).permute(2, 0, 1), self.orientation)

    def _scaling(self, shrink: int) -> dict[str, int]:
        if shrink == 1:
            return {}
        height, width = (self.height, self.width) if self.orientation < 5 else (self.width, self.height)
        return {"min_height": -(-height // shrink), "min_width": -(-width // shrink), "min_factor": 2}


def open_image(
    data: bytes, *, where: str, exif: Exif = "apply", max_pixels: int = MAX_PIXELS, reference: bool = False
) -> EncodedImage:
    """Read the header of an encoded image and check it against the pixel limit.

    Args:
        data: the encoded image.
        where: names the image in messages: path, or shard and key.
        exif: "apply" turns the image as its EXIF orientation says (what a viewer shows), "ignore" leaves the stored
            orientation, as plain pillow and open_clip do.
        max_pixels: refuse more pixels than this. Above twice `MAX_PIXELS` pillow refuses by itself.
        reference: decode with pillow even where the fast path exists.

    Raises:
        BrokenImageError: no image, a format that is not supported, or too many pixels.
    """
    if data[:2] == b"\xff\xd8" and not reference:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            colorspace = ""  # pillow decides whether it is broken
        if colorspace in {"YCbCr", "RGB", "Gray"}:
            _check_pixels(height, width, where, max_pixels)
            orientation = _jpeg_orientation(data) if exif == "apply" and _has_exif(data) else 1
            if orientation >= 5:
                height, width = width, height
            return EncodedImage(data, where, height, width, orientation, fast=True)
    image = _pillow_open(data, where)
    _check_pixels(image.height, image.width, where, max_pixels)
    orientation = _pillow_orientation(image) if exif == "apply" else 1
    height, width = (image.height, image.width) if orientation < 5 else (image.width, image.height)
    return EncodedImage(data, where, height, width, orientation, fast=False)


def decode_image(
    data: bytes,
    *,
    where: str,
    min_size: int | None = None,
    exif: Exif = "apply",
    max_pixels: int = MAX_PIXELS,
    reference: bool = False,
) -> Tensor:
    """Decode an image to RGB.

    Args:
        data: the encoded image: JPEG, PNG, WebP, AVIF, GIF or TIFF (first frame), BMP, PPM, JPEG 2000;
            HEIC with the extra `heif`.
        where: names the image in messages.
        min_size: the caller will resize the shorter side to this, so a JPEG may be decoded smaller, though not below
            twice this size (see `EncodedImage.shrink_for`). None decodes in full.
        exif, max_pixels, reference: see `open_image`.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        BrokenImageError: (a DataError) no image, unsupported, too many pixels, truncated or corrupt; see its `cause`.
    """
    image = open_image(data, where=where, exif=exif, max_pixels=max_pixels, reference=reference)
    return image.decode(1 if min_size is None else image.shrink_for(image.height, image.width, min_size))


def image_to_tensor(image: Image.Image, where: str = "image", exif: Exif = "apply") -> Tensor:
    """A pillow image as (3, H, W) uint8 RGB, by the same rules as `decode_image`.

    Raises:
        BrokenImageError: its file is broken, or its mode has no defined range (32-bit integers, floats).
    """
    try:
        image.load()
        turned = ImageOps.exif_transpose(image) if exif == "apply" else image
        pixels = _rgb(turned, where)
    except DataError:
        raise
    except Exception as error:  # pillow raises a dozen types on broken data: OSError, SyntaxError, struct.error, ...
        raise _broken(error, where) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _check_pixels(height: int, width: int, where: str, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BrokenImageError(
            f"{where} has {width} x {height} = {width * height:,} pixels by its header, more than the limit of "
            f"{max_pixels:,}. It was not decoded; make it smaller, or raise max_pixels if you trust it.",
            "too many pixels",
        )


def _pillow_open(data: bytes, where: str) -> Image.Image:
    formats = _formats()
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and b"avif" not in data[16:64]:
        formats = ("HEIF",)
        _register_heif(where)
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        found = f"{len(data)} bytes that open with {data[:8]!r}" if data else "an empty file"
        raise BrokenImageError(
            f"{where} is not an image: found {found}, expected JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, PPM or JPEG 2000."
            " Replace it or take it out.",
            "not an image",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImageError(
            f"{where} has too many pixels and was not decoded: {error}", "too many pixels"
        ) from error
    except Exception as error:  # a broken header: pillow raises a dozen types, see image_to_tensor
        raise _broken(error, where) from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this build of pillow has; AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _register_heif(where: str) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise BrokenImageError(
            f"{where} is a HEIC image, which needs the extra `heif`: pip install 'vlkit[heif]'.",
            "HEIC without vlkit[heif]",
        ) from error
    pillow_heif.register_heif_opener()


def _pillow_pixels(data: bytes, where: str) -> np.ndarray:
    image = _pillow_open(data, where)
    try:
        image.load()
        return _rgb(image, where)
    except DataError:
        raise
    except Exception as error:  # see image_to_tensor
        raise _broken(error, where) from error


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    """(H, W, 3) uint8, writable."""
    if image.mode.startswith("I"):
        image = _scaled_to_8_bits(image, where)
    elif image.mode == "F":
        raise BrokenImageError(
            f"{where} holds floating-point pixels, whose range is not defined. Store it with 8 or 16 bits a channel.",
            "unsupported pixel type",
        )
    elif image.mode == "P":
        # Transparency is dropped either way; left in, pillow warns that the conversion should go through RGBA.
        image = image.copy()
        image.info.pop("transparency", None)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _scaled_to_8_bits(image: Image.Image, where: str) -> Image.Image:
    values = np.asarray(image)
    if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
        raise BrokenImageError(
            f"{where} holds 32-bit pixels, whose range is not defined. Store it with 8 or 16 bits a channel.",
            "unsupported pixel type",
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def _broken(error: Exception, where: str) -> BrokenImageError:
    truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
    cause = "truncated" if truncated else "corrupt"
    return BrokenImageError(
        f"{where} is {cause} and cannot be decoded ({type(error).__name__}: {error}). Replace it or take it out.", cause
    )


def _has_exif(data: bytes) -> bool:
    """Whether a JPEG carries EXIF; most do not, and looking takes a fiftieth of asking pillow."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return True
        if marker == 0xDA:  # the scan begins
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return b"Exif\0\0" in data  # not laid out as usual: let pillow find out


def _jpeg_orientation(data: bytes) -> int:
    try:
        return _pillow_orientation(Image.open(io.BytesIO(data), formats=("JPEG",)))
    except Exception:  # pixels are whole, only the metadata is not: decode as stored
        return 1


def _pillow_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # pillow turns TIFF by itself when it loads the pixels
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata of an otherwise whole image
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _oriented(image: Tensor, orientation: int) -> Tensor:
    """Turn (3, H, W) as the EXIF orientation says; 6 and 8 are the quarter turns cameras write."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return image.flip(flips) if flips else image
