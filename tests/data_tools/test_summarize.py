"""Summaries: every figure of a small hand-made set, the text, the JSON and the page."""

import io
import json
import os
import random
import re
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data_tools.histogram import histogram
from data_tools.summarize import summarize_shards, write_html

HOSTILE = "<img src=x onerror=alert(1)>"


def image(seed, size, kind="JPEG", mode="RGB", **options):
    random.seed(seed)
    pixels = Image.frombytes("RGB", size, random.randbytes(size[0] * size[1] * 3)).convert(mode)
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(size):
    exif = Image.Exif()
    exif[0x0112] = 6
    return image(9, size, exif=exif)


def huge_png():
    """A header of 20,000 x 20,000 pixels and nothing behind it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def files_of(samples):
    return ((f"{key}.{suffix}", content) for key, fields in samples.items() for suffix, content in fields.items())


@pytest.fixture
def shards(tmp_path, write_tar):
    twin = image(0, (40, 30))
    first = {
        "a": {"jpg": twin, "txt": b"a red dog\na dog", "cls": b"1"},
        "b": {"png": image(1, (64, 64), "PNG", "P"), "txt": b"a dog", "cls": b"0"},
        "c": {"jpg": twin, "txt": HOSTILE.encode(), "cls": b"1"},
    }
    second = {
        "d": {"jpg": rotated((100, 50)), "txt": b"\x1b[31mred"},
        "e": {"jpg": b"no image", "json": b'{"captions": ["one two", "a dog"]}'},
    }
    write_tar(tmp_path / "00000.tar", files_of(first))
    write_tar(tmp_path / "00001.tar", files_of(second))
    return tmp_path


def test_figures(shards):
    summary = summarize_shards(shards)
    assert (summary.num_shards, summary.num_samples, summary.num_captions, summary.num_words) == (2, 5, 7, 15)
    assert summary.samples_per_shard == (2, 2.5, 3)
    assert summary.formats == {"JPEG RGB": 3, "PNG P": 1, "not an image": 1}
    assert summary.num_unreadable == 1
    assert summary.shorter_side.ranges() == [("0-31", 2), ("32-63", 1), ("64-127", 1)]
    # 4:3 twice, a square, and 2:1 lying on its side after its EXIF rotation
    assert [(label, count) for label, count in summary.aspect.ranges() if count] == [
        ("0.50-0.67", 1),
        ("0.95-1.05", 1),
        ("1.33-1.50", 2),
    ]
    assert summary.captions_per_image.ranges() == [("1", 3), ("2", 2)]
    assert summary.num_duplicate_images == 1
    assert summary.num_duplicate_captions == 2
    assert [(found.what, found.count) for found in summary.repeated_images] == [("00000/a", 2)]
    assert [(found.what, found.count) for found in summary.repeated_captions] == [("a dog", 3)]
    assert summary.labels == {"0": 1, "1": 2}
    assert summary.image_bytes == _image_bytes(shards)
    assert summary.tar_bytes == sum(tar.stat().st_size for tar in shards.glob("*.tar"))


def _image_bytes(folder):
    total = 0
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            total += sum(member.size for member in tar if member.name.endswith(("jpg", "png")))
    return total


def test_class_names(shards):
    (shards / "classnames.txt").write_text(f"{HOSTILE}\ndog\n")
    assert summarize_shards(shards).labels == {HOSTILE: 1, "dog": 2}
    (shards / "classnames.txt").write_text("cat\n")
    summary = summarize_shards(shards)
    assert summary.labels == {"0": 1, "1": 2}
    assert any("classnames.txt has 1 names, but a label is 1" in line for line in summary.problems)


def test_workers_see_the_same(shards):
    assert summarize_shards(shards, workers=2) == summarize_shards(shards)


def test_progress(shards):
    seen = []
    summarize_shards(shards, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 5), (5, 5)]


def test_text_is_safe_for_a_terminal(shards):
    text = summarize_shards(shards).to_text()
    assert "\x1b" not in text
    assert re.search(r"samples +5 \(2 to 3 a shard", text)
    assert re.search(r"3 x a dog", text)


def test_json(shards):
    summary = summarize_shards(shards)
    values = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert "thumbnails" not in values
    assert values["repeated_captions"] == [{"what": "a dog", "count": 3}]
    assert sum(values["aspect"]["counts"]) == 4


def test_page_holds_the_images_and_escapes_all_text(shards, tmp_path):
    (shards / "classnames.txt").write_text(f"{HOSTILE}\ndog\n")
    page_path = tmp_path / "out" / "page.html"
    write_html(summarize_shards(shards), page_path)
    page = page_path.read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert page.count("does not decode") == 1
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "\x1b" not in page
    assert not re.search(r"(src|href)=\"(?!data:image/jpeg)", page), "the page must need no other file"


def test_page_stays_small_however_large_the_set(tmp_path, write_tar):
    samples = {f"{i:04d}": {"jpg": image(i, (160, 160), quality=95), "txt": b"noise"} for i in range(300)}
    write_tar(tmp_path / "0.tar", files_of(samples))
    summary = summarize_shards(tmp_path)
    assert 20 < len(summary.thumbnails) < 100
    assert summary.thumbnails[0].key == "0/0000"
    write_html(summary, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2_100_000


def test_oversized_image_is_measured_by_its_header_alone(tmp_path, write_tar):
    samples = {"a": {"png": huge_png(), "txt": b"x"}, "b": {"jpg": image(1, (8, 8)), "txt": b"y"}}
    write_tar(tmp_path / "0.tar", files_of(samples))
    summary = summarize_shards(tmp_path)
    assert summary.formats == {"too many pixels": 1, "JPEG RGB": 1}
    assert summary.thumbnails[0].url is None


def test_histogram_ranges():
    found = histogram([0, 1, 1, 5, 250], [0, 1, 2, 100])
    assert found.counts == (1, 2, 1, 1)
    assert found.ranges() == [("0", 1), ("1", 2), ("2-99", 1), (">= 100", 1)]
    assert (found.smallest, found.median, found.mean, found.largest) == (0, 1, 51.4, 250)
    assert histogram([], [0, 1]).to_lines() == ["  (none)"]


@pytest.mark.skipif(not os.environ.get("VLKIT_DATA"), reason="VLKIT_DATA is not set")
def test_tiny_imagenet():
    folder = Path(os.environ["VLKIT_DATA"]) / "tiny_imagenet_shards"
    if not folder.is_dir():
        pytest.skip("tiny_imagenet_shards is not in VLKIT_DATA")
    summary = summarize_shards(folder)
    assert (summary.num_shards, summary.num_samples) == (3, 8000)
    assert summary.num_captions - summary.num_duplicate_captions == 200
    assert summary.formats["JPEG L"] > 0
    assert summary.shorter_side.smallest == summary.shorter_side.largest == 64
