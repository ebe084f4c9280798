"""Small pictures inside reports."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from vlkit.data.decode import decode_image
from vlkit.data.records import ImageRef

THUMBNAIL_SIDE = 160  # pixels


def thumbnail(image: ImageRef | Tensor, side: int = THUMBNAIL_SIDE, where: str = "the image") -> str:
    """A small JPEG as a data URL.

    Args:
        image: where the image lies, or its pixels (3,H,W) uint8.
        side: the longer side, in pixels; a smaller image stays as it is.
        where: names the image in an error.

    Raises:
        DataError: the image cannot be decoded.
    """
    pixels = image if isinstance(image, Tensor) else decode_image(image.read(), where=where, min_size=side)
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3, (pixels.dtype, pixels.shape)
    small = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
