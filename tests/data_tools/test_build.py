"""Shard building: read back by webdataset itself, killed and continued, fed with broken input, out of space."""

import gc
import hashlib
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
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

import data_tools.build
from data_tools.build import build_shards
from data_tools.build_plan import hold_folder
from data_tools.write_shard import ShardOptions, ShardPart, write_shard
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.shard_index import ShardSet
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def picture(width=48, height=32, seed=0, mode="RGB"):
    """A smooth picture, as photographs are: JPEG keeps it within a few grey levels."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(4 * x + c + seed) + np.cos(5 * y - seed * c) for c in range(3)]
    return Image.fromarray((127 + 60 * np.stack(waves, 2)).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def records_of(count, **sizes):
    return [
        Record(f"photo {n}.jpg", ImageRef(data=encoded(picture(seed=n, **sizes))), (f"caption {n}", f"another {n}"))
        for n in range(count)
    ]


def source_of(records, class_names=()):
    return Source(tuple(records), "folder", Path("root"), class_names)


def letters(texts):
    """A tokenizer: one id for each letter."""
    return [[ord(letter) for letter in text] for text in texts]


def hashes(folder, *suffixes):
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(suffixes or (".tar", ".arrow", ".json")))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_webdataset_reads_the_same_samples(tmp_path):
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


def test_sources_read_built_shards(tmp_path):
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


def test_tokenizers_may_give_tensors(tmp_path):
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


def test_captions_are_folded_and_hostile_text_stays_text(tmp_path):
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
def test_broken_records_are_left_out_counted_and_named(tmp_path, max_side):
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
def test_resized_images_of_every_kind(tmp_path, kind):
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
def test_small_images_keep_their_bytes(tmp_path, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(40, 20), form, **({"exif": exif} if form == "JPEG" else {}))
    report = build_shards(source_of([Record("x", ImageRef(data=data), ("c",))]), tmp_path / "s", max_side=40)
    (shard,) = ShardSet.open(tmp_path / "s").shards
    assert report.num_reencoded == 0 and shard.image_bytes(0) == data
    extension = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    assert extension in shard.members(0)


def test_shuffle_is_a_permutation_of_its_seed(tmp_path):
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


def test_other_options_or_input_are_refused(tmp_path):
    source = source_of(records_of(3))
    build_shards(source, tmp_path / "s", max_side=32)
    with pytest.raises(DataError, match=r"other input or options: max_side was 32, now 40.*name another --out"):
        build_shards(source, tmp_path / "s", max_side=40)
    with pytest.raises(DataError, match=r'source was ".*", now ".*"'):
        build_shards(source_of(records_of(2) + records_of(1)), tmp_path / "s", max_side=32)
    report = build_shards(source, tmp_path / "s", max_side=32)
    assert (report.num_shards_kept, report.num_samples) == (1, 3)
    (tmp_path / "s/build.json").write_text('{"of": "another program"}')
    with pytest.raises(DataError, match="holds tars that no `vlkit shards build` made"):
        build_shards(source, tmp_path / "s", max_side=32)


def test_a_second_build_in_the_same_folder_is_refused(tmp_path):
    with hold_folder(tmp_path), pytest.raises(DataError, match="Another build is writing to"):
        build_shards(source_of(records_of(1)), tmp_path)
    assert build_shards(source_of(records_of(1)), tmp_path).num_samples == 1
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Cannot make the folder .*file"):
        build_shards(source_of(records_of(1)), tmp_path / "file")


def test_options_out_of_range(tmp_path):
    for option, value in (("samples_per_shard", 0), ("max_side", 0), ("quality", 101)):
        with pytest.raises(ConfigError, match=f"{option} = {value}: expected"):
            build_shards(source_of(records_of(1)), tmp_path, **{option: value})


def test_finished_shards_are_kept_and_damaged_ones_redone(tmp_path):
    source = source_of(records_of(6))
    build_shards(source, tmp_path, samples_per_shard=2)
    before = hashes(tmp_path)
    (tmp_path / "00001.stats.json").unlink()  # not committed
    (tmp_path / "00002.tar").write_bytes((tmp_path / "00002.tar").read_bytes()[:700])
    (tmp_path / "00002.tar.4711.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match=r"is not finished: 2 of 3 shards.*it continues"):
        ShardSet.open(tmp_path)
    untouched = (tmp_path / "00000.tar").stat().st_mtime_ns
    report = build_shards(source, tmp_path, samples_per_shard=2)
    assert report.num_shards_kept == 1 and report.num_samples == 6
    assert hashes(tmp_path) == before and (tmp_path / "00000.tar").stat().st_mtime_ns == untouched
    assert not list(tmp_path.glob("*.tmp"))


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from data_tools.build import build_shards
from vlkit.data.sources import read_source

def letters(texts):
    return [[ord(letter) for letter in text] for text in texts]

if __name__ == "__main__":
    source = read_source(sys.argv[2])
    build_shards(source, Path(sys.argv[3]), samples_per_shard=4, max_side=96, workers=2, tokenizers={"abc": letters})
"""


def kill_and_continue(tmp_path, chooser, kills):
    """Compare an uninterrupted build on one process with one on two that is killed `kills` times at random moments.

    That two processes write the same bytes is seen once more in tests/cli/test_shards.py.
    """
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(80):
        photos.joinpath(f"class {number % 3}").mkdir(parents=True, exist_ok=True)
        picture(320, 240, seed=number).save(photos / f"class {number % 3}/{number}.jpg")
    (photos / "class 0/broken.jpg").write_bytes(b"no image")
    source = read_source(photos)
    build_shards(source, tmp_path / "whole", samples_per_shard=4, max_side=96, tokenizers={"abc": letters})
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    root = Path(data_tools.build.__file__).parents[1]
    for _ in range(kills):
        finished = len(list(out.glob("*.stats.json"))) if out.exists() else 0
        target = finished + chooser.randint(0 if finished else 1, 2)
        build = subprocess.Popen([sys.executable, script, root, photos, out])
        while build.poll() is None and len(list(out.glob("*.stats.json"))) < target:
            time.sleep(0.001)
        time.sleep(chooser.random() * 0.03)
        build.kill()
        build.wait()
    report = build_shards(source, out, samples_per_shard=4, max_side=96, tokenizers={"abc": letters}, workers=1)
    assert report.num_shards == 21 and report.num_samples == 80
    assert hashes(out) == hashes(tmp_path / "whole")
    assert (out / "failures.jsonl").read_bytes() == (tmp_path / "whole/failures.jsonl").read_bytes()
    return report


def test_a_killed_build_continues_to_the_same_bytes(tmp_path):
    report = kill_and_continue(tmp_path, random.Random(0), kills=1)
    assert report.num_shards_kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_builds_killed_many_times(tmp_path, seed):
    kill_and_continue(tmp_path, random.Random(seed), kills=6)


def test_no_space_left(tmp_path):
    """A limit on the size of files, so that writing fails in the middle of the second shard as on a full disk."""
    records = records_of(2) + records_of(2, width=900, height=600)
    source = source_of(records)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"No space left in .* finished shards are kept. Free space there and run"):
            build_shards(source, tmp_path / "s", samples_per_shard=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert names == {"build.json", "00000.tar", "00000.index.arrow", "00000.parquet", "00000.stats.json"}
    report = build_shards(source, tmp_path / "s", samples_per_shard=2)
    assert (report.num_shards_kept, report.num_samples) == (1, 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", ["tar", "index.arrow", "stats.json"])
def test_a_full_disk_at_every_file(tmp_path, suffix):
    """The temporary file of each kind is led to a device that is always full."""
    part = ShardPart("00000", 4, records_of(2), tmp_path, ShardOptions(None, 90, {"abc": letters}, ()))
    (tmp_path / f"00000.{suffix}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left in"):
        write_shard(part)
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / f"00000.{suffix}").exists()
    assert not (tmp_path / "00000.stats.json").exists()
    assert write_shard(part)["num_samples"] == 2


def test_a_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        target = Path("/proc/vlkit-shards")  # root may write anywhere but there
    else:
        tmp_path.chmod(0o555)
        target = tmp_path / "s"
    with pytest.raises(DataError, match="Cannot make the folder"):
        build_shards(source_of(records_of(1)), target)
