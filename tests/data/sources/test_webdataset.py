"""Tar shards as a source."""

import json

import pytest
from PIL import Image

from data_tools.build import build_shards
from vlkit.data.sources import read_source
from vlkit.errors import DataError


def sample(key, captions=b"a dog\nein Hund\n", **more):
    fields = {"jpg": b"image " + key.encode(), "txt": captions, **more}
    return [(f"{key}.{suffix}", content) for suffix, content in fields.items() if content is not None]


def test_records_point_into_the_tars(tmp_path, write_tar):
    write_tar(tmp_path / "00000.tar", sample("000") + sample("001", b"one"))
    write_tar(tmp_path / "00001.tar", sample("000", None, json=b'{"caption": "from json"}'))
    source = read_source(tmp_path)
    assert source.format == "webdataset"
    assert [(record.key, record.captions) for record in source] == [
        ("00000/000", ("a dog", "ein Hund")),
        ("00000/001", ("one",)),
        ("00001/000", ("from json",)),
    ]
    assert [record.image.read() for record in source] == [b"image 000", b"image 001", b"image 000"]
    assert [record.label for record in source] == [None] * 3
    assert source.class_names == ()


@pytest.mark.parametrize("spec", ["{00000..00001}.tar", "*.tar", "00001.tar"])
def test_specifications(tmp_path, spec, write_tar):
    for name in ("00000", "00001"):
        write_tar(tmp_path / f"{name}.tar", sample("k"))
    keys = [record.key for record in read_source(tmp_path / spec)]
    assert keys == (["00001/k"] if spec == "00001.tar" else ["00000/k", "00001/k"])


def test_labels_and_class_names(tmp_path, write_tar):
    files = sample("a", cls=b"2") + sample("b", cls=b"0\n")
    source = read_source(write_tar(tmp_path / "plain" / "0.tar", files))
    assert ([record.label for record in source], source.class_names) == ([2, 0], ("0", "1", "2"))
    named = write_tar(tmp_path / "named" / "test" / "0.tar", files)
    (tmp_path / "named" / "classnames.txt").write_text("cat\ndog\nbird\nfish\n")
    assert read_source(named).class_names == ("cat", "dog", "bird", "fish")
    (tmp_path / "named" / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"classnames\.txt has 2 names, but a label is 2"):
        read_source(named)


def test_split_folders(tmp_path, write_tar):
    write_tar(tmp_path / "train" / "0.tar", sample("a"))
    write_tar(tmp_path / "test" / "0.tar", sample("a"))
    assert {record.key: record.split for record in read_source(tmp_path)} == {"test/0/a": "test", "train/0/a": "train"}
    assert [record.key for record in read_source(tmp_path, split="train")] == ["train/0/a"]
    with pytest.raises(DataError, match=r"No split 'val' in .* Present: train, test\."):
        read_source(tmp_path, split="val")


def test_what_is_wrong_is_counted_with_shard_and_key(tmp_path, write_tar):
    files = sample("a") + sample("b", cls=b"many") + [("c.txt", b"no image")] + sample("d", None)
    source = read_source(write_tar(tmp_path / "00007.tar", files))
    assert [record.key for record in source] == ["00007/a", "00007/d"]
    lines = "\n".join(source.problems.lines())
    assert "00007/b (shard 00007.tar, sample b: .cls holds" in lines
    assert "no image: 00007.tar: c" in lines
    assert "00007.tar: d" in lines  # a sample without caption


def test_truncated_shard_keeps_what_comes_before_the_cut(tmp_path, write_tar):
    path = write_tar(tmp_path / "00000.tar", sample("a") + sample("b") + sample("c"))
    with open(path, "r+b") as file:
        file.truncate(512 * 9)
    source = read_source(path)
    assert [record.key for record in source] == ["00000/a", "00000/b"]
    assert source.problems.total


def test_missing_shard(tmp_path):
    with pytest.raises(DataError, match="0000"):
        read_source(tmp_path / "{00000..00003}.tar")


def test_split_named_in_the_samples(tmp_path, write_tar):
    def own(key, split):
        return sample(key, json=json.dumps({"key": key, "split": split}).encode())

    write_tar(tmp_path / "00000.tar", own("a", "train") + own("b", "dev") + own("c", None))
    write_tar(tmp_path / "00001.tar", own("d", "train"))
    assert [record.split for record in read_source(tmp_path)] == ["train", "val", None, "train"]
    assert [record.key for record in read_source(tmp_path, split="train")] == ["00000/a", "00001/d"]
    assert [record.key for record in read_source(tmp_path, split="validation")] == ["00000/b"]
    with pytest.raises(DataError, match=r"No split 'test' in .*Present: train, val"):
        read_source(tmp_path, split="test")


def test_split_of_shards_built_from_a_source_that_names_some(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "pairs.csv").write_text("image,caption,split\na.png,x,\nb.png,y,test\nc.png,z,train\n")
    build_shards(read_source(tmp_path / "pairs.csv", images=tmp_path / "images"), tmp_path / "out")
    assert [record.split for record in read_source(tmp_path / "out")] == [None, "test", "train"]
    assert [record.captions for record in read_source(tmp_path / "out", split="test")] == [("y",)]


def test_shards_of_img2dataset(tmp_path, write_tar):
    for shard in ("00000", "00001"):
        files = [sample(f"{shard}{row:04d}", b"a dog", json=b'{"status": "success"}') for row in (0, 2)]
        write_tar(tmp_path / f"{shard}.tar", files[0] + files[1])
        (tmp_path / f"{shard}.parquet").write_bytes(b"all rows, failures too")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = read_source(tmp_path)
    assert (source.format, len(source)) == ("webdataset", 4)
    assert source.problems.lines() == ["1 x tar that img2dataset did not finish: no _stats.json (kept): 00001.tar"]
