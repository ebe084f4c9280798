"""Sets of shards: one running number over all samples, what names them, and how few files stay open."""

import pickle
from pathlib import Path

import pytest

from vlkit.data.shard_index import ShardSet, expand_shards
from vlkit.errors import DataError


def test_shard_set(tmp_path, write_tar, triples):
    for number, keys in enumerate((["a", "b", "c"], [], ["a"])):
        write_tar(tmp_path / f"{number:05d}.tar", triples(keys))
    progress = []
    shards = ShardSet.open(tmp_path, lambda done, total: progress.append((done, total)))
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert shards.num_samples == len(shards) == 4 and shards.offsets.tolist() == [0, 3, 3, 4]
    assert [shards.key(i) for i in range(4)] == ["00000/a", "00000/b", "00000/c", "00002/a"]
    shard, row = shards.locate(3)
    assert (shard.path, row) == (tmp_path / "00002.tar", 0)
    with pytest.raises(IndexError):
        shards.locate(4)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.fingerprint == shards.fingerprint and copy.key(3) == "00002/a"
    assert len(pickle.dumps(ShardSet(shards.shards))) < 2000


def test_fingerprint_follows_the_data_not_the_folder(tmp_path, write_tar, triples):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", triples(["x", "y"]))
        write_tar(tmp_path / folder / "1.tar", triples(["z"], size=701 if folder == "c" else 700))
    prints = [ShardSet.open(tmp_path / folder).fingerprint for folder in ("a", "b", "c")]
    assert prints[0] == prints[1] != prints[2]
    backwards = ShardSet.open([tmp_path / "a/1.tar", tmp_path / "a/0.tar"])
    assert backwards.fingerprint != prints[0]


def test_expand_shards(tmp_path, monkeypatch, write_tar):
    for name in ("00000", "00001", "00002", "x", "y"):
        write_tar(tmp_path / f"{name}.tar", [])
    (tmp_path / "deep").mkdir()
    write_tar(tmp_path / "deep/z.tar", [])

    def expanded(spec):
        return [path.relative_to(tmp_path).as_posix() for path in expand_shards(spec)]

    assert expanded(tmp_path) == ["00000.tar", "00001.tar", "00002.tar", "x.tar", "y.tar"]
    assert expanded(str(tmp_path / "{00000..00002}.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert expanded(f"{tmp_path}/{{y,x}}.tar::{tmp_path}/0*.tar") == [
        "y.tar", "x.tar", "00000.tar", "00001.tar", "00002.tar",
    ]  # fmt: skip
    assert expanded([tmp_path / "x.tar", str(tmp_path / "deep")]) == ["x.tar", "deep/z.tar"]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("*.tar")[0] == Path("00000.tar")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{root}/absent", r"No shard at .*absent; expected a tar, a folder of tars, a glob or braces"),
        ("{root}/{{00000..00003}}.tar", r"2 of 4 shards are missing: .*00002\.tar, .*00003\.tar"),
        ("{root}/*.tgz", r"No file fits .*\*\.tgz"),
        ("{root}/up", r"No \.tar files in .*up, but in .*deep: name one of these"),
        ("{root}/packed", r"No \.tar files in .*packed\. There is a\.tar\.gz: unpack compressed tars"),
        ("{root}/00000.tar::{root}/00000.tar", r"00000\.tar is named twice"),
        ("pipe:cat 0.tar", r"pipe:cat 0.tar: no commands are run\. Name a path or a URL"),
        ("s4://bucket/0.tar", r"s4://bucket/0.tar: no protocol s4:// is known .* Did you mean s3"),
        ("{root}/{{0..9999999}}.tar", r"10,000,000 shards"),
    ],
)
def test_expand_shards_messages(tmp_path, spec, message, write_tar):
    for name in ("00000.tar", "00001.tar"):
        write_tar(tmp_path / name, [])
    (tmp_path / "up/deep").mkdir(parents=True)
    write_tar(tmp_path / "up/deep/a.tar", [])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tar.gz").touch()
    with pytest.raises(DataError, match=message):
        expand_shards(spec.format(root=tmp_path))


def test_more_shards_than_files_that_stay_open(tmp_path, write_tar, triples):
    """Columns and descriptors are let go, and come back when asked for again."""
    count = 140  # above the number of descriptors held
    for number in range(count):
        write_tar(tmp_path / f"{number:05d}.tar", triples(["a"]))
    shards = ShardSet.open(tmp_path)
    for _ in range(2):
        assert all(shard.image_bytes(0).startswith(b"a|image") for shard in shards.shards)
