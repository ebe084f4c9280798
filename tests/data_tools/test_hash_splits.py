"""Splits by hash: stable, of the asked sizes, and in folders that read back as splits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.hash_splits import parse_fractions, split_by_hash
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def source_of(keys):
    return Source(tuple(Record(key, ImageRef(data=b"x"), ("a",)) for key in keys), "folder", Path("."))


def keys_of(source):
    return {record.key for record in source}


def test_every_record_in_one_split_about_as_large_as_asked():
    keys = [f"{n}.jpg" for n in range(4000)]
    found = split_by_hash(source_of(keys), {"train": 0.8, "val": 0.15, "test": 0.05})
    assert sorted(key for part in found.values() for key in keys_of(part)) == sorted(keys)
    assert all(record.split == name for name, part in found.items() for record in part)
    for name, share in (("train", 0.8), ("val", 0.15), ("test", 0.05)):
        # 4 standard deviations of a binomial count.
        assert abs(len(found[name]) - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_a_record_stays_where_it_is_when_others_come_and_go():
    fractions = {"train": 0.5, "val": 0.5}
    few = split_by_hash(source_of(f"{n}" for n in range(100)), fractions)
    more = split_by_hash(source_of(f"{n}" for n in reversed(range(300))), fractions)
    assert keys_of(few["val"]) == {key for key in keys_of(more["val"]) if int(key) < 100}
    other = split_by_hash(source_of(f"{n}" for n in range(100)), fractions, seed=1)
    assert keys_of(other["val"]) != keys_of(few["val"])


def test_known_values():
    """The division is part of what a seed promises: it must not change between versions or machines."""
    found = split_by_hash(source_of(f"{n}" for n in range(20)), {"train": 0.7, "val": 0.3})
    assert sorted(map(int, keys_of(found["val"]))) == [0, 2, 5, 8, 14, 16]


@pytest.mark.parametrize("text", ["train", "train=0.9,val=0.2", "train=a", "train=1,val=0", "a/b=1", "t=0.5,t=0.5", ""])
def test_what_is_no_division(text):
    with pytest.raises(ConfigError, match=r"--split-by-hash: "):
        parse_fractions(text)


def test_an_empty_split():
    with pytest.raises(DataError, match=r"Split 'val' got none of the 2 records"):
        split_by_hash(source_of(["a", "b"]), {"train": 0.999, "val": 0.001})


def test_command(tmp_path, call_vlkit):
    (tmp_path / "images").mkdir()
    for n in range(20):
        Image.new("RGB", (4, 4), (n, n, n)).save(tmp_path / "images" / f"{n}.png")
        (tmp_path / "images" / f"{n}.txt").write_text(f"number {n}")
    arguments = ["shards", "build", tmp_path / "images", "--out", tmp_path / "out", "--no-tokens", "--workers", 1]
    called = call_vlkit(*arguments, "--split-by-hash", "train=0.7,val=0.3", "--json")
    assert called.code == 0, called.err
    report = json.loads(called.out)
    assert report["train"]["num_samples"] + report["val"]["num_samples"] == 20
    train, val = (read_source(tmp_path / "out", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (report["train"]["num_samples"], report["val"]["num_samples"])
    assert not {record.captions for record in train} & {record.captions for record in val}
