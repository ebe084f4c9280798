"""HEIC photographs: read with the extra `heif`, named by it without."""

import base64
import sys

import pytest

from vlkit.data.decode import BrokenImageError, decode_image
from vlkit.data.sources import read_source

# 64 x 48 pixels, the left half red, the right half blue, as a phone would write them (HEVC, brand heic).
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAA"
    "AERAAAEAAQAAAAABoQABAAAAAAAAAE8AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADd"
    "aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAA"
    "AwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xh"
    "cAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAFdtZGF0AAAA"
    "SygBrxOA9SeBP//gSUf/se54fgWDMT/95ICP56Xn/5gI7qARBl4jwbCjbfQpiQHeIsX4DFMAw6c2iyLtWqzdIrk5uwBtSaxxCseGuA=="
)


@pytest.fixture
def photograph(tmp_path):
    (tmp_path / "IMG_0001.HEIC").write_bytes(HEIC)
    source = read_source(tmp_path)
    assert source.format == "folder"
    return source.records[0]


def test_decoded_with_the_extra(photograph):
    pytest.importorskip("pillow_heif", reason="needs the extra `heif`")
    pixels = decode_image(photograph.image.read(), where=photograph.key)
    assert pixels.shape == (3, 48, 64)
    left, right = pixels[:, :, 8:24].float().mean((1, 2)), pixels[:, :, 40:56].float().mean((1, 2))
    assert (left - left.new_tensor([200, 30, 40])).abs().max() < 6
    assert (right - right.new_tensor([20, 60, 220])).abs().max() < 6


def test_without_the_extra_the_message_names_it(photograph, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BrokenImageError, match=r"IMG_0001\.HEIC is a HEIC image.*pip install 'vlkit\[heif\]'") as error:
        decode_image(photograph.image.read(), where=photograph.key)
    assert error.value.cause == "HEIC without vlkit[heif]"
