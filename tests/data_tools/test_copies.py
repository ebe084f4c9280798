"""Copies are found whatever was done to them, other images are left alone: hashes, search, dedupe, leakage."""

import hashlib
import io
import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.build import build_shards
from data_tools.copy_samples import copy_samples
from data_tools.dedupe import dedupe_shards, write_groups
from data_tools.hamming_search import HammingIndex, _cut, _masks
from data_tools.leakage import find_leakage, write_leaks
from data_tools.pair_page import write_dedupe_page, write_leakage_page
from data_tools.perceptual_hash import RADIUS, WINDOWS, perceptual_hashes, thumbnail
from data_tools.same_picture import compare
from data_tools.signatures import normal_caption
from data_tools.validate import validate_shards
from vlkit.data.decode import decode_image
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.shard_index import ShardSet
from vlkit.errors import ConfigError


def picture(seed, width=160, height=120):
    """Blots of colour, unlike those of any other seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut(image, *shares):
    """The image without these shares at the left, top, right and bottom."""
    left, top, right, bottom = (round(s * side) for s, side in zip(shares, image.size * 2, strict=True))
    return image.crop((left, top, image.width - right, image.height - bottom))


def changed(image, seed=0):
    """What people do to images on their way into another data set."""
    width, height = image.size
    shares = random.Random(seed)
    return {
        "re-encoded": encoded(image, quality=40),
        "halved": encoded(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS), quality=85),
        "squashed": encoded(image.resize((height, height)), quality=85),
        "cut": encoded(cut(image, *(shares.uniform(0, 0.05) for _ in range(4))), quality=85),
        "bordered off": encoded(cut(image, 0.05, 0.05, 0.05, 0.05), quality=85),
        "brighter": encoded(image.point(lambda value: min(255, int(value * 1.05 + 8))), quality=85),
    }


def source_of(images, root, captions=None, prefix="image"):
    records = [
        Record(f"{prefix}{i}", ImageRef(data=data), captions[i] if captions else (f"{prefix} number {i}",))
        for i, data in enumerate(images)
    ]
    return Source(tuple(records), "table", root)


def built(images, folder, captions=None, per_shard=8):
    tokenizers = {"letters": lambda texts: [[*map(ord, text)] for text in texts]}
    source = source_of(images, folder, captions)
    build_shards(source, folder, samples_per_shard=per_shard, tokenizers=tokenizers)
    return ShardSet.open(folder)


# --- hashes and their search ---


def hashes_of(*images):
    return perceptual_hashes(np.stack([thumbnail(decode_image(data, where="")) for data in images]))


def slow_hash(image):
    """The definition: signs of the lowest frequencies, diagonal by diagonal, by the DCT written out."""
    grey = np.asarray(image, float) @ [0.299, 0.587, 0.114]
    places = sorted(((y, x) for y in range(11) for x in range(11) if y + x), key=lambda p: (sum(p), p))[:64]
    at = (np.arange(64) + 0.5) / 64
    bits = [(np.cos(np.pi * y * at) @ grey @ np.cos(np.pi * x * at)) > 0 for y, x in places]
    return np.packbits(bits).view(np.uint64)[0]


def test_hash_is_the_signs_of_the_lowest_frequencies():
    small = [picture(seed, 64, 64) for seed in range(8)]
    found = perceptual_hashes(np.stack([np.asarray(image) for image in small]))
    slow = np.array([slow_hash(image) for image in small])
    # Cells are averaged, the slow one takes their middles: a sign at zero may differ.
    assert found.shape == (8, len(WINDOWS)) and np.bitwise_count(found[:, 0] ^ slow).max() <= 1


def test_hashes_of_copies_are_near_and_of_others_far():
    originals = hashes_of(*(encoded(picture(seed), quality=95) for seed in range(12)))
    for seed in range(4):
        for how, data in changed(picture(seed), seed).items():
            distance = np.bitwise_count(originals[seed] ^ hashes_of(data)[0, 0]).min()
            assert distance <= RADIUS, how
    apart = np.bitwise_count(originals[:, None, :] ^ originals[None, :, :1])[~np.eye(12, dtype=bool)]
    assert apart.min() > RADIUS


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([0, 3, 7, 10]), st.sampled_from([60, 700]))
def test_search_finds_exactly_what_comparing_all_finds(seed, radius, number):
    random_numbers = np.random.default_rng(seed)
    items = random_numbers.integers(0, 2**64, number, dtype=np.uint64)
    queries = items[random_numbers.integers(0, number, 40)]
    for query in range(len(queries)):
        for bit in random_numbers.integers(0, 64, random_numbers.integers(0, 14)):
            queries[query] ^= np.uint64(1) << np.uint64(bit)
    found = [
        pair
        for near in HammingIndex(items, radius).search(queries)
        for pair in zip(near.query.tolist(), near.item.tolist(), near.distance.tolist(), strict=True)
    ]
    distance = np.bitwise_count(queries[:, None] ^ items)
    expected = [(*map(int, pair), int(distance[tuple(pair)])) for pair in np.argwhere(distance <= radius)]
    assert sorted(found) == sorted(expected)


def test_bands_leave_no_gap():
    """Whatever 10 bits differ, one band is within its reach."""
    for bands in (3, 4, 5, 6, 8):
        places = _cut(bands, 10)
        least = sum(reach + 1 for _, _, reach in places)  # bits needed to be out of reach everywhere
        assert least == 11 and sum(width for _, width, _ in places) <= 64
    assert len(list(_masks(5, 2))) == 1 + 5 + 10


# --- the second look ---


def test_a_cut_copy_is_laid_onto_its_original():
    image = picture(3)
    whole = thumbnail(decode_image(encoded(image, quality=95), where=""))
    for shares in [(0.1, 0, 0, 0.1), (0.05, 0.05, 0.05, 0.05), (0, 0.08, 0.03, 0)]:
        part = thumbnail(decode_image(encoded(cut(image, *shares), quality=90), where=""))
        match = compare(np.stack([whole, part]), np.stack([part, whole]), np.zeros(2, np.int64))
        assert match.same.all() and match.correlation.min() > 0.97


def test_another_colour_or_another_picture_is_no_copy():
    red, blue = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    red.paste((200, 30, 30), (16, 16, 48, 48))
    blue.paste((30, 30, 200), (16, 16, 48, 48))
    pairs = [(red, blue), (picture(1, 64, 64), picture(2, 64, 64))]
    first, second = (np.stack([np.asarray(pair[side]) for pair in pairs]) for side in (0, 1))
    match = compare(first, second, np.zeros(2, np.int64))
    assert match.correlation[0] > 0.9 and not match.same.any()


# --- dedupe ---


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """20 pictures; bytes, pixels, near copies and captions of some again, and two that do not show anything."""
    base = [encoded(picture(seed), quality=95) for seed in range(20)]
    copies = [
        base[2],  # 20: bytes
        encoded(Image.open(io.BytesIO(base[3])), "PNG"),  # 21: pixels
        *changed(picture(5)).values(),  # 22-27: near 5
        encoded(picture(6, 320, 240), quality=95),  # 28: larger than 6, so 6 goes
        base[2],  # 29: bytes
        encoded(Image.new("RGB", (30, 30), "white")),  # 30, 31: flat
        encoded(Image.new("RGB", (31, 30), "white")),
    ]
    images = [*base, *copies]
    captions = [(f"picture {i}",) for i in range(len(images))]
    captions[9], captions[8] = ("A dog,  running!",), ("a dog running",)
    return built(images, tmp_path_factory.mktemp("doubled"), captions)


def test_dedupe_finds_each_kind_and_keeps_the_largest(doubled, tmp_path):
    report = dedupe_shards([str(shard.path) for shard in doubled.shards], by=("bytes", "pixels", "near", "captions"))
    assert dict(report.rows())["kept"] == 32 - 11
    assert report.counts == {"bytes": 2, "pixels": 1, "near": 7, "captions": 1}
    copy_of = report.copy_of.tolist()
    assert [copy_of[i] for i in (20, 29, 21, 6, 9)] == [2, 2, 3, 28, 8]
    assert copy_of[22:28] == [5] * 6 and (report.similarity[22:28] > 0.97).all()
    assert report.num_flat == 2 and copy_of[30] == copy_of[31] == -1

    write_groups(report, tmp_path / "groups.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert sum(len(line["copies"]) for line in lines) == 11 and len(lines) == 5
    assert lines[0]["kept"] == doubled.key(2)
    write_groups(report, tmp_path / "groups.parquet")
    table = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    assert {row["key"]: row["copy_of"] for row in table}[doubled.key(21)] == doubled.key(3)
    with pytest.raises(ConfigError, match=r"jsonl or \.parquet"):
        write_groups(report, tmp_path / "groups.txt")

    write_dedupe_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 2 * 11 and "near copy, similarity" in page


def test_dedupe_by_some_kinds_only(doubled):
    paths = [str(shard.path) for shard in doubled.shards]
    assert dedupe_shards(paths, by=["bytes"]).counts == {"bytes": 2, "pixels": 0, "near": 0, "captions": 0}
    assert dedupe_shards(paths, by=["pixels"]).counts["pixels"] == 3  # equal bytes are equal pixels
    with pytest.raises(ConfigError, match="expected some of bytes"):
        dedupe_shards(paths, by=["looks"])
    with pytest.raises(ConfigError, match="radius"):
        dedupe_shards(paths, radius=40)


def test_dedupe_by_embeddings(doubled):
    """What counts is the cosine, whatever the pixels say: here every image is its own."""
    paths = [str(shard.path) for shard in doubled.shards]
    report = dedupe_shards(paths, embed=lambda records: torch.eye(len(records)))
    assert report.counts["near"] == 0 and report.counts["bytes"] == 2


def test_many_copies_of_one_image_are_compared_with_one(tmp_path):
    images = [encoded(picture(1), quality=60 + i) for i in range(20)]
    report = dedupe_shards([str(shard.path) for shard in built(images, tmp_path / "s").shards])
    assert report.keep.sum() == 1 and report.num_compared < 40


def test_captions_are_compared_by_their_words():
    assert normal_caption("  A Dog,\n running… ") == normal_caption("a dog running") == "a dog running"
    assert normal_caption("\uff21\uff22") == "ab" and normal_caption("!?") == ""
    assert normal_caption("कुत्ता") == "कुत्ता"  # the marks of a script are no punctuation


# --- the copy ---


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_copy_has_the_bytes_of_the_chosen_samples(doubled, tmp_path, workers):
    keep = np.arange(32) % 3 != 0
    copied = copy_samples(doubled, keep, tmp_path / "a", samples_per_shard=10)
    assert (copied.num_samples, copied.num_shards, copied.num_renamed) == (21, 3, 0)
    copy_samples(doubled, keep, tmp_path / "b", samples_per_shard=10, workers=workers)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    digests = [
        [hashlib.sha256((tmp_path / side / name).read_bytes()).hexdigest() for name in names] for side in ("a", "b")
    ]
    assert digests[0] == digests[1]
    new = ShardSet.open(tmp_path / "a")
    for row, old in enumerate(np.flatnonzero(keep).tolist()):
        (shard, i), (other, j) = new.locate(row), doubled.locate(old)
        assert shard.key(i) == other.key(j)
        assert {name: shard.read_member(i, name) for name in shard.members(i)} == {
            name: other.read_member(j, name) for name in other.members(j)
        }
        assert [ids.tolist() for ids in shard.tokens("letters", i)] == [
            ids.tolist() for ids in other.tokens("letters", j)
        ]
    assert validate_shards(tmp_path / "a").ok

    # Stopped before its second shard was finished, and started again.
    for name in ("00001.tar", "00001.stats.json"):
        (tmp_path / "a" / name).unlink()
    again = copy_samples(doubled, keep, tmp_path / "a", samples_per_shard=10)
    assert again.num_shards_kept == 2
    assert [hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() for name in names] == digests[0]


def test_keys_that_recur_are_told_apart(tmp_path):
    folders = [tmp_path / "x", tmp_path / "y"]
    for number, folder in enumerate(folders):
        built([encoded(picture(10 * number + i)) for i in range(3)], folder)
    shards = ShardSet.open("::".join(map(str, folders)))
    copied = copy_samples(shards, np.ones(6, bool), tmp_path / "out")
    new = ShardSet.open(tmp_path / "out")
    assert copied.num_renamed == 6 and new.num_samples == 6 and validate_shards(tmp_path / "out").ok
    with pytest.raises(ConfigError, match="another folder"):
        copy_samples(ShardSet.open(folders[0]), np.ones(3, bool), folders[0])


# --- leakage ---


def test_leakage_finds_copies_and_captions(tmp_path):
    evaluation = [picture(seed) for seed in range(100, 112)]
    whole = [encoded(image, quality=92) for image in evaluation]
    planted = [whole[0], encoded(Image.open(io.BytesIO(whole[1])), "PNG"), *changed(evaluation[2], 3).values()]
    # The evaluation image is itself a part of what was trained on.
    larger = encoded(evaluation[4], quality=92)
    whole[4] = encoded(cut(evaluation[4], 0, 0.08, 0.08, 0), quality=92)
    images = [*(encoded(picture(seed)) for seed in range(10)), *planted, larger]
    captions = [(f"caption {i}",) for i in range(len(images))]
    captions[1] = ("IMAGE  number 7.",)
    shards = built(images, tmp_path / "train", captions)
    one, two = source_of(whole[:8], tmp_path), source_of(whole[8:], tmp_path, prefix="other")
    report = find_leakage(tmp_path / "train", {"one": one, "two": two})
    found = {(leak.sample, leak.record): leak.kind for leak in report.leaks["one"]}
    expected = {(10, 0): "bytes", (11, 1): "pixels", **{(12 + i, 2): "near" for i in range(6)}, (18, 4): "near"}
    assert found == {**expected, (1, 7): "captions"} and report.leaks["two"] == ()
    assert report.counts("one") == {
        "images": 8, "bytes": 1, "pixels": 1, "near": 7, "captions": 1, "images_in_training": 4,
    }  # fmt: skip
    assert np.flatnonzero(~report.keep).tolist() == list(range(10, 19))
    assert np.flatnonzero(~report.without(["captions"])).tolist() == [1]

    write_leaks(report, tmp_path / "leaks.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and lines[1]["key"] == shards.key(10) and lines[1]["evaluation_key"] == "image0"
    write_leakage_page(report, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<figure>") == 20


def test_pages_escape_what_captions_hold(tmp_path):
    attack = "<img src=x onerror=alert(1)>\x1b[31m"
    data = encoded(picture(1))
    built([data, data], tmp_path / "s", [(attack,), (attack,)])
    write_dedupe_page(dedupe_shards(tmp_path / "s"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page and "\x1b" not in page


def test_real_photographs(vlkit_data, tmp_path):
    """Of 240 photographs 40 come back changed: all are found, and no two different ones are taken for copies."""
    names = sorted((vlkit_data / "flickr8k" / "Images").glob("*.jpg"))[::33][:240]
    originals = [path.read_bytes() for path in names]
    copies = [list(changed(Image.open(io.BytesIO(originals[i])).convert("RGB"), i).values())[i % 6] for i in range(40)]
    built([*originals[40:], *copies], tmp_path / "train", per_shard=120)
    report = find_leakage(tmp_path / "train", {"test": source_of(originals[:40], tmp_path)})
    pairs = {(leak.sample, leak.record) for leak in report.leaks["test"] if leak.kind != "captions"}
    assert pairs == {(200 + i, i) for i in range(40)}
    assert dedupe_shards(tmp_path / "train").keep.all()
