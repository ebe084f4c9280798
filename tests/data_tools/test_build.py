"""Shard building: read back by webdataset itself, fed with broken input, with images of every kind."""

import gc
import hashlib
import io
import json
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from data_tools.build import build_shards
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.shard_index import ShardSet
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def source_of(records, class_names=()):
    return Source(tuple(records), "folder", Path("root"), class_names)


def letters(texts):
    """A tokenizer: one id for each letter."""
    return [[ord(letter) for letter in text] for text in texts]


def test_webdataset_reads_the_same_samples(tmp_path, records_of):
    records = records_of(7)
    report = build_shards(source_of(records), tmp_path / "s", samples_per_shard=3, tokenizers={"abc": letters})
    assert (report.num_shards, report.num_samples, report.num_captions, report.num_reencoded) == (3, 7, 14, 0)
    tars = [str(tmp_path / f"s/0000{n}.tar") for n in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its tars open
        samples = list(webdataset.WebDataset(tars, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"0000{n // 3}000{n % 3}" for n in range(7)]
    for sample, record in zip(samples, records, strict=True):
        assert {name for name in sample if not name.startswith("__")} == {"jpg", "txt", "json"}
        assert sample["jpg"] == record.image.data
        assert sample["txt"].decode().split("\n") == list(record.captions)
        about = json.loads(sample["json"])
        assert about["key"] == record.key and about["captions"] == list(record.captions)
        assert (about["width"], about["height"]) == (48, 32)
    shards = ShardSet.open(tmp_path / "s")
    assert shards.num_samples == 7 and not shards.problems and not shards.notes
    for number, record in enumerate(records):
        shard, row = shards.locate(number)
        assert shard.image(row).read() == record.image.data and shard.captions(row) == record.captions
        assert [ids.tolist() for ids in shard.tokens("abc", row)] == letters(record.captions)


def test_sources_read_built_shards(tmp_path, picture, encoded):
    records = [
        Record("b/1.png", ImageRef(data=encoded(picture(), "PNG")), (), 1, "train"),
        Record("a/2.webp", ImageRef(data=encoded(picture(), "WEBP")), ("its own",), 0, "train"),
    ]
    build_shards(source_of(records, ("sea_lion", "red  fox")), tmp_path / "s")
    back = read_source(tmp_path / "s")
    assert back.format == "webdataset" and back.class_names == ("sea_lion", "red fox")
    assert [(record.captions, record.label) for record in back] == [(("red fox",), 1), (("its own",), 0)]
    assert [record.image.read() for record in back] == [record.image.data for record in records]
    (shard,) = ShardSet.open(tmp_path / "s").shards
    assert list(shard.members(0)) == ["cls", "json", "png", "txt"] and "webp" in shard.members(1)
    assert shard.json(0)["class_name"] == "red  fox" and shard.json(0)["split"] == "train"


def test_tokenizers_may_give_tensors(tmp_path, records_of):
    def padded(texts):
        rows = torch.zeros(len(texts), 20, dtype=torch.long)
        for row, ids in enumerate(letters(texts)):
            rows[row, : len(ids)] = torch.tensor(ids)
        return rows

    build_shards(source_of(records_of(3)), tmp_path / "s", tokenizers={"padded": padded, "plain": letters})
    (shard,) = ShardSet.open(tmp_path / "s").shards
    for row in range(3):
        ids = [[token.tolist() for token in shard.tokens(name, row)] for name in shard.tokenizers]
        assert ids[0] == ids[1] == letters(shard.captions(row))


def test_captions_are_folded_and_hostile_text_stays_text(tmp_path, picture, encoded):
    captions = (" two\nlines\r\nof  text ", "", "\ud800 lone", "\x1b[31m<img src=x onerror=alert(1)>", "Größe 漢字")
    record = Record("../../etc/x\x1b.jpg", ImageRef(data=encoded(picture())), captions)
    build_shards(source_of([record]), tmp_path / "s")
    (shard,) = ShardSet.open(tmp_path / "s").shards
    expected = ("two lines of text", "? lone", "\x1b[31m<img src=x onerror=alert(1)>", "Größe 漢字")
    assert shard.captions(0) == expected and tuple(shard.json(0)["captions"]) == expected
    assert shard.key(0) == "000000000" and shard.json(0)["key"] == record.key


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("max_side", [None, 16])
def test_broken_records_are_left_out_counted_and_named(tmp_path, max_side, picture, encoded, records_of):
    jpeg = encoded(picture())
    bad = {
        "text.jpg": ("not an image", ImageRef(data=b"<html>not found</html>")),
        "empty.jpg": ("not an image", ImageRef(data=b"")),
        "cut.jpg": ("truncated", ImageRef(data=jpeg[: len(jpeg) // 2])),
        "huge.png": ("too many pixels", ImageRef(data=png_header(20_000, 20_000))),
        "absent.jpg": ("unreadable file", ImageRef(path=str(tmp_path / "absent.jpg"))),
    }
    records = records_of(2)
    records += [Record(key, image, ("a caption",)) for key, (_, image) in bad.items()]
    records.append(Record("silent.jpg", ImageRef(data=jpeg), (" ", "")))
    records += records_of(1)
    progress = []
    started = time.monotonic()
    report = build_shards(
        source_of(records),
        tmp_path / "s",
        samples_per_shard=4,
        max_side=max_side,
        tokenizers={"abc": letters},
        progress=lambda done, total: progress.append((done, total)),
    )
    assert time.monotonic() - started < 20  # the huge one was not decoded
    assert progress == [(0, 9), (4, 9), (8, 9), (9, 9)]
    assert report.num_records == 9 and report.num_samples == 3
    causes = {key: cause for key, (cause, _) in bad.items()} | {"silent.jpg": "no caption"}
    lines = [json.loads(line) for line in (tmp_path / "s/failures.jsonl").read_text().splitlines()]
    assert {line["key"]: line["cause"] for line in lines} == causes
    assert sum(report.failures.counts.values()) == len(lines) == 6
    assert [(line["shard"], line["row"]) for line in lines] == [(f"{n // 4:05d}", n % 4) for n in range(2, 8)]
    message = next(line["message"] for line in lines if line["key"] == "huge.png")
    assert "too many pixels" in message and "not decoded" in message
    shards = ShardSet.open(tmp_path / "s")
    assert [shards.key(number) for number in range(3)] == ["00000/000000000", "00000/000000001", "00002/000020000"]
    assert shards.shards[1].num_samples == 0 and not shards.problems
    rows = [row for n in range(3) for row in pq.read_table(tmp_path / f"s/{n:05d}.parquet").to_pylist()]
    assert {row["source_key"]: row["error"] for row in rows if row["status"] == "failed"} == causes
    kept = [row for row in rows if row["status"] == "success"]
    assert [row["key"] for row in kept] == ["000000000", "000000001", "000020000"]
    by_key = {record.key: record for record in records}
    for row in kept:
        record = by_key[row["source_key"]]
        assert row["sha256"] == hashlib.sha256(record.image.read()).hexdigest()
        assert row["caption"] == "\n".join(record.captions) and row["width"] <= row["original_width"]


def test_nothing_usable_is_an_error(tmp_path):
    records = [Record("x.jpg", ImageRef(data=b"nothing"), ("a caption",))]
    with pytest.raises(DataError, match=r"None of the 1 records could be used: 1 x not an image: x\.jpg"):
        build_shards(source_of(records), tmp_path / "s")
    with pytest.raises(DataError, match="has no records"):
        build_shards(source_of([]), tmp_path / "t")


def expected_pixels(image, size):
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.int16)


@pytest.mark.parametrize(
    "kind", ["rgb", "grey", "cmyk", "palette", "palette with transparency", "16 bit", "exif", "large", "tall"]
)
def test_resized_images_of_every_kind(tmp_path, kind, picture, encoded):
    plain = picture(200, 120)
    expected = plain
    if kind in ("rgb", "large", "tall"):
        expected = plain = plain.resize({"rgb": (200, 120), "large": (2000, 1500), "tall": (300, 1)}[kind])
        data = encoded(plain, "JPEG", quality=98, subsampling=0)
    elif kind == "grey":
        data, expected = encoded(plain.convert("L"), "PNG"), plain.convert("L").convert("RGB")
    elif kind == "cmyk":
        data = encoded(plain.convert("CMYK"), "JPEG", quality=98)
    elif kind == "palette":
        expected = plain.quantize(200, dither=Image.Dither.NONE).convert("RGB")
        data = encoded(plain.quantize(200, dither=Image.Dither.NONE), "PNG")
    elif kind == "palette with transparency":
        palette = plain.quantize(200, dither=Image.Dither.NONE)
        data, expected = encoded(palette, "PNG", transparency=3), palette.convert("RGB")
    elif kind == "16 bit":
        grey = np.asarray(plain.convert("L"))
        data = encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
        expected = Image.fromarray(grey).convert("RGB")
    else:
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        data = encoded(plain, "JPEG", quality=98, subsampling=0, exif=exif)
        expected = plain.transpose(Image.Transpose.ROTATE_270)
    record = Record("x", ImageRef(data=data), ("a caption",))
    report = build_shards(source_of([record]), tmp_path / "s", max_side=64, quality=95)
    assert report.num_reencoded == 1
    (shard,) = ShardSet.open(tmp_path / "s").shards
    stored = Image.open(io.BytesIO(shard.image_bytes(0)))
    width, height = expected.size
    size = (64, max(round(height * 64 / width), 1)) if width >= height else (round(width * 64 / height), 64)
    assert stored.format == "JPEG" and stored.mode == "RGB" and stored.size == size
    assert not stored.getexif()
    about = shard.json(0)
    assert (about["width"], about["height"]) == size
    assert (about["original_width"], about["original_height"]) == expected.size
    error = np.abs(np.asarray(stored, np.int16) - expected_pixels(expected, size))
    assert error.mean() < 2 and np.quantile(error, 0.99) <= 9, (error.mean(), error.max())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_small_images_keep_their_bytes(tmp_path, form, picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(40, 20), form, **({"exif": exif} if form == "JPEG" else {}))
    report = build_shards(source_of([Record("x", ImageRef(data=data), ("c",))]), tmp_path / "s", max_side=40)
    (shard,) = ShardSet.open(tmp_path / "s").shards
    assert report.num_reencoded == 0 and shard.image_bytes(0) == data
    extension = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    assert extension in shard.members(0)


def test_shuffle_is_a_permutation_of_its_seed(tmp_path, records_of):
    source = source_of(records_of(12))
    keys = {}
    for name, options in {"plain": {}, "one": {"seed": 1}, "two": {"seed": 2}, "again": {"seed": 1}}.items():
        shuffle = name != "plain"
        build_shards(source, tmp_path / name, samples_per_shard=5, shuffle=shuffle, **options)
        shards = ShardSet.open(tmp_path / name)
        keys[name] = [shard.json(row)["key"] for shard, row in map(shards.locate, range(12))]
    assert keys["plain"] == [record.key for record in source]
    assert sorted(keys["one"]) == sorted(keys["plain"]) and keys["one"] != keys["plain"] != keys["two"] != keys["one"]
    assert keys["one"] == keys["again"]


def test_options_out_of_range(tmp_path, records_of):
    for option, value in (("samples_per_shard", 0), ("max_side", 0), ("quality", 101)):
        with pytest.raises(ConfigError, match=f"{option} = {value}: expected"):
            build_shards(source_of(records_of(1)), tmp_path, **{option: value})
