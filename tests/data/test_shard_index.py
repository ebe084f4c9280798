"""The shard index against `tarfile`, which reads every byte, and against broken tars made on purpose."""

import io
import itertools
import random
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkit.data import shard_columns
from vlkit.data.shard_index import ShardIndex, ShardSet, sidecar_path, write_index
from vlkit.data.shard_sidecar import build_table, map_table
from vlkit.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(path, files, form="ustar", mtime=0.0):
    """A tar of (name, content) made by tarfile."""
    with tarfile.open(path, "w", format=FORMATS[form], encoding="utf-8") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return path


def slow_samples(path):
    """webdataset's grouping rule over what tarfile reads: key -> {suffix: content}, doubtful keys left out."""
    runs = []
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        for member in tar:
            found = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name, re.DOTALL)
            if not member.isreg() or not found or re.match(r"__[^/]*__($|/)", member.name):
                continue
            key, suffix = found[1], found[2].lower()
            if not runs or runs[-1][0] != key:
                runs.append((key, []))
            runs[-1][1].append((suffix, tar.extractfile(member).read()))
    keys = [key for key, _ in runs]
    return {
        key: dict(files)
        for key, files in runs
        if keys.count(key) == 1 and len(dict(files)) == len(files) and sum(s == "jpg" for s, _ in files) == 1
    }


def read_all(index):
    return {
        index.key(i): {suffix: index.read_member(i, suffix) for suffix in index.members(i)}
        for i in range(index.num_samples)
    }


def assert_unmixed(index):
    """Every sample's image, caption and JSON name that sample's key."""
    for i in range(index.num_samples):
        key = index.key(i)
        assert index.image(i).read().rstrip(b"\xff") == f"{key}|image".encode()
        assert index.image_bytes(i) == index.image(i).read()
        assert index.captions(i) in ((f"{key}|caption",), ())
        assert index.json(i) in ({"key": key}, None)


names = st.text(st.sampled_from("ab.é/漢 _"), min_size=1, max_size=8).filter(
    lambda name: not re.search(r"^/|//|/$|(^|/)\.{1,2}(/|$)", name)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stems=st.lists(st.tuples(names, st.integers(1, 40)), max_size=6),
    suffixes=st.lists(st.sampled_from(["jpg", "JPG", "txt", "json", "seg.png", "npy"]), min_size=1, max_size=4),
    form=st.sampled_from(sorted(FORMATS)),
    mtime=st.sampled_from([0.0, 1.5]),
)
def test_index_equals_tarfile(tmp_path, stems, suffixes, form, mtime):
    files = [
        (f"{stem * (repeat if form != 'ustar' else 1)}.{suffix}", f"{stem}{suffix}".encode() * repeat)
        for stem, repeat in stems
        for suffix in suffixes
    ]
    path = pack(tmp_path / "t.tar", files, form, mtime)
    index = ShardIndex.open(path)
    expected = slow_samples(path)
    found = read_all(index)
    # A tar may hold a key with only `a.b.jpg`; the oracle knows plain `.jpg` images alone.
    assert {key: found[key] for key in expected} == expected
    assert [key for key in found if key in expected] == list(expected)
    assert all(not any(s == "jpg" for s in found[key]) for key in found.keys() - expected.keys())


@pytest.mark.parametrize("form", FORMATS)
def test_long_and_foreign_names(tmp_path, form, triples):
    deep = "/".join(["folder" * 3] * 6)  # 113 bytes: needs ustar's prefix field, or a pax or GNU record
    keys = [f"{deep}/000000001", "Straße/größe-漢字-🙂", "a b/c'd", f"{deep}/{'x' * 90}"]
    if form != "ustar":
        keys.append("y" * 300)
    path = pack(tmp_path / "n.tar", list(triples(keys)), form)
    index = ShardIndex.open(path)
    assert [index.key(i) for i in range(len(index))] == keys
    assert read_all(index) == slow_samples(path)
    assert_unmixed(index)
    assert not index.problems.total and not index.notes.total


def test_columns_captions_labels_and_tokens(tmp_path):
    files = [
        ("s0.webp", b"w"), ("s0.txt", b"first line\r\n\n second \n"), ("s0.cls", b"7"),
        ("s1.png", b"pp"), ("s1.json", '{"caption": "a café"}'.encode()), ("s1.npy", b"n"),
        ("s2.jpeg", b"jjj"), ("s2.json", b'{"text": ["one", "", "two"], "caption": null}'),
        ("s3.jpg", b"j"), ("s3.cls", b"dog"),
        ("s4.jpg", b"j"), ("s4.json", b"[1]"),
    ]  # fmt: skip
    path = pack(tmp_path / "c.tar", files)
    ids = {"bpe": [[[1, 2, 3], [4]], [[49407]], [[5], []], [], [[6]]], "big": [[[1 << 16]], [[]], [], [[0]], []]}
    assert write_index(path, ids) == sidecar_path(path) == tmp_path / "c.index.arrow"
    index = ShardIndex.open(path)
    assert [index.captions(i) for i in range(4)] == [("first line", "second"), ("a café",), ("one", "two"), ()]
    assert [index.label(i) for i in range(3)] == [7, None, None]
    assert index.json(0) is None and index.json(1) == {"caption": "a café"}
    assert index.read_member(1, "npy") == b"n" and index.read_member(1, "txt") is None
    assert index.column("image_size").tolist() == [1, 2, 3, 1, 1]
    assert index.tokenizers == ("big", "bpe") and index.tokens("other", 0) is None
    assert [[row.tolist() for row in index.tokens("bpe", i)] for i in range(5)] == ids["bpe"]
    assert [[row.tolist() for row in index.tokens("big", i)] for i in range(5)] == ids["big"]
    assert index.tokens("bpe", 0)[0].dtype == np.uint16 and index.tokens("big", 0)[0].dtype == np.int32
    with pytest.raises(DataError, match=r"shard c\.tar, sample s3: \.cls holds b'dog', expected a class number"):
        index.label(3)
    with pytest.raises(DataError, match="sample s4: JSON is a list, not an object"):
        index.json(4)
    with pytest.raises(DataError, match="5 samples, but got token ids for 1"):
        write_index(path, {"bpe": [[[1]]]})


def test_columns_are_mapped_not_copied(tmp_path, triples):
    path = pack(tmp_path / "z.tar", list(triples([f"{n:06d}" for n in range(3000)], size=1)))
    write_index(path, {"bpe": [[[1, 2]]] * 3000})
    before = pa.total_allocated_bytes()
    index = ShardIndex.open(path)
    assert index.column("image_offset")[-1] > 0 and index.tokens("bpe", 2999)[0].tolist() == [1, 2]
    assert pa.total_allocated_bytes() - before < 20_000
    assert not index.column("image_offset").flags.writeable


@pytest.mark.parametrize("form", FORMATS)
def test_a_cut_tar_never_mixes(tmp_path, form, triples):
    keys = ["0000", "0001", "ü" + "l" * 120 if form != "ustar" else "0002", "0003"]
    whole = pack(tmp_path / "whole.tar", list(triples(keys)), form).read_bytes()
    full = read_all(ShardIndex.open(tmp_path / "whole.tar"))
    ends = itertools.accumulate(512 + -(-len(content) // 512) * 512 for _, content in triples(keys))
    offsets = {*range(0, len(whole), 128), *(end + nudge for end in ends for nudge in (-1, 0, 1))}
    end_mark = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "cut.tar"
    for offset in sorted(offset for offset in offsets if offset < len(whole)):
        sidecar_path(path).unlink(missing_ok=True)
        path.write_bytes(whole[:offset])
        index = ShardIndex.open(path)
        assert_unmixed(index)
        found = read_all(index)
        assert list(found) == keys[: len(found)]
        complete = [key for key, files in found.items() if files == full[key]]
        assert complete[: len(found) - 1] == list(found)[:-1]  # only the last one may lack its JSON
        assert bool(index.problems.total) == (offset < end_mark + 512), offset
        # A sample whose successor has begun is certainly whole.
        assert len(found) >= sum(offset > whole.find(f"{key}|image".encode()) for key in keys[1:])


def test_the_message_of_a_tar_cut_in_the_middle(tmp_path, triples):
    path = pack(tmp_path / "00012.tar", list(triples(["a", "b", "c"])))
    path.write_bytes(path.read_bytes()[: 7 * 512 + 800])  # 288 bytes into the image of b
    index = ShardIndex.open(path)
    assert [index.key(i) for i in range(len(index))] == ["a"]
    assert index.problems.lines() == [
        "1 x cut inside a file; nothing after it can be read: byte 3584, b.jpg",
    ]
    path.write_bytes(path.read_bytes()[: 7 * 512 + 5])  # 5 bytes into its header: another file of a, or the next?
    assert ShardIndex.open(path).problems.lines() == [
        "1 x cut short (the end mark of a tar is missing); nothing after it can be read: byte 3584",
        "1 x not all files of the sample could be read: a",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_damaged_headers_never_mix(tmp_path, seed, triples):
    chooser = random.Random(seed)
    keys = [f"{n:04d}" for n in range(6)]
    whole = pack(tmp_path / "whole.tar", list(triples(keys))).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    path = tmp_path / "hurt.tar"
    for _ in range(40):
        hurt = bytearray(whole)
        at = chooser.choice(headers) + chooser.randrange(512)
        hurt[at] ^= 1 << chooser.randrange(8)
        path.write_bytes(hurt)
        sidecar_path(path).unlink(missing_ok=True)
        index = ShardIndex.open(path)
        assert_unmixed(index)
        assert any("damaged header" in cause for cause in index.problems.counts)
        assert index.num_samples >= at // 512 // 7 - 1  # 7 blocks a sample; those before the damage are there


def test_doubtful_samples_are_left_out_and_named(tmp_path, triples):
    files = [
        *triples(["ok0"]),
        ("dup.jpg", b"1"), ("dup.txt", b"1"),
        ("apart.jpg", b"1"),
        ("twice.jpg", b"1"), ("twice.jpg", b"2"), ("twice.txt", b"1"),
        ("apart.txt", b"1"),
        ("img.v1.jpg", b"1"), ("img.v1.txt", b"1"), ("img.v2.jpg", b"2"), ("img.v2.txt", b"2"),
        ("one.v1.jpg", b"one.v1 image"), ("one.v2.txt", b"caption of another"), ("one.v1.txt", b"its caption"),
        ("both.jpg", b"1"), ("both.png", b"2"), ("both.txt", b"1"),
        ("texts.jpg", b"1"), ("texts.txt", b"1"), ("texts.text", b"2"),
        ("alone.txt", b"1"),
        ("mask.jpg", b"the image"), ("mask.txt", b"c"), ("mask.seg.png", b"m"),
        ("bare.jpg", b"1"),
        ("dup.jpg", b"2"), ("dup.txt", b"2"),
        ("README", b"1"), (".hidden.jpg", b"1"), ("__meta__/x.jpg", b"1"),
        *triples(["ok1"]),
    ]  # fmt: skip
    index = ShardIndex.open(pack(tmp_path / "d.tar", files))
    assert [index.key(i) for i in range(len(index))] == ["ok0", "one", "mask", "bare", "ok1"]
    assert index.problems.examples == {
        "duplicate key": ["dup", "twice", "dup"],
        "files of the sample are not adjacent": ["apart", "apart"],
        "key with two dots: several images share what precedes the first dot": ["img"],
        "several images": ["both"],
        "several files with a caption": ["texts"],
        "no image": ["alone"],
        "no caption and no label (kept)": ["bare"],
    }
    assert index.notes.examples == {
        "key with two dots": ["one", "mask"],
        "file outside any sample": ["README", ".hidden.jpg", "__meta__/x.jpg"],
    }
    assert index.image(1).read() == b"one.v1 image" and index.captions(1) == ("its caption",)
    assert index.image(2).read() == b"the image" and index.read_member(2, "seg.png") == b"m"


def test_links_sparse_files_and_directories(tmp_path, triples):
    with tarfile.open(tmp_path / "l.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in triples(["a"]):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (("d", tarfile.DIRTYPE), ("b.jpg", tarfile.LNKTYPE), ("b.txt", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info, io.BytesIO())
        for name, content in triples(["c"]):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = ShardIndex.open(tmp_path / "l.tar")
    assert list(read_all(index)) == ["a", "c"]
    assert index.problems.examples == {"a file of the sample is a link or sparse, without content": ["b"]}
    assert_unmixed(index)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_tars_of_the_tar_command(tmp_path, form, triples):
    folder = tmp_path / "f"
    folder.mkdir()
    keys = ["000", "001", "k" * (60 if form == "v7" else 120)]
    keys = [key for key in keys if form != "ustar" or len(key) <= 90]
    for name, content in triples(keys):
        (folder / name).write_bytes(content)
    with open(folder / "zz.jpg", "wb") as file:  # a hole: stored as a sparse map
        file.seek(1 << 20)
        file.write(b"end")
    options = ["--sparse"] if form in ("gnu", "oldgnu", "posix") else []
    tar = tmp_path / "s.tar"
    listed = [name for name, _ in triples(keys)]
    subprocess.run(["tar", f"--format={form}", *options, "-cf", tar, "-C", folder, *listed, "zz.jpg"], check=True)
    index = ShardIndex.open(tar)
    assert {index.key(i) for i in range(len(index))} == {*keys} | (set() if options else {"zz"})
    for i, key in enumerate(keys):
        assert index.image(i).read().rstrip(b"\xff") == f"{key}|image".encode()


def test_numbers_in_base_256_and_appended_data(tmp_path, triples):
    content = bytearray(pack(tmp_path / "b.tar", list(triples(["a", "b"]))).read_bytes())
    content[124:136] = b"\x80" + (700).to_bytes(11, "big")
    header = content[:512]
    header[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "b.tar").write_bytes(content)
    assert_unmixed(index := ShardIndex.open(tmp_path / "b.tar"))
    assert len(index) == 2 and not index.problems.total
    (tmp_path / "two.tar").write_bytes(content * 2)
    two = ShardIndex.open(tmp_path / "two.tar")
    assert len(two) == 2
    (line,) = two.problems.lines()
    assert "more data after the end mark of the tar (two tars in one file?)" in line and f"byte {len(content)}" in line


@pytest.mark.parametrize(("suffix", "kind"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_compressed_tars_are_refused(tmp_path, suffix, kind):
    path = tmp_path / "c.tar"
    with tarfile.open(path, f"w:{suffix}"):
        pass
    with pytest.raises(DataError, match=rf"c\.tar is compressed \({kind}\).*Unpack it to a plain \.tar"):
        ShardIndex.open(path)


def test_what_is_no_tar_has_no_samples(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (tmp_path / "y.tar").touch()
    assert [*ShardIndex.open(tmp_path / "x.tar").problems.counts] == ["damaged header; nothing after it can be read"]
    with pytest.raises(DataError, match=r"No usable sample in .*x\.tar: 1 x damaged header.*y\.tar: 1 x empty file"):
        ShardSet.open(tmp_path)
    with pytest.raises(DataError, match="Cannot read shard"):
        ShardIndex.open(tmp_path / "absent.tar")


def test_a_stale_sidecar_is_made_again(tmp_path, triples):
    path = pack(tmp_path / "s.tar", list(triples(["a", "b"])))
    write_index(path, {"bpe": [[[1]], [[2]]]})
    first = ShardIndex.open(path)
    assert first.note is None and first.tokens("bpe", 1)[0].tolist() == [2]
    pack(path, list(triples(["a", "c"])))  # the same size
    second = ShardIndex.open(path)
    assert second.note == "the index belonged to other contents of the tar and was made again, without token ids"
    assert second.key(1) == "c" and second.tokens("bpe", 1) is None and second.digest != first.digest
    assert ShardIndex.open(path).note is None
    sidecar_path(path).write_bytes(sidecar_path(path).read_bytes()[:300])
    assert "was broken" in (ShardIndex.open(path).note or "")
    shard_columns.open_columns.cache_clear()
    with pytest.raises(DataError, match="changed while it was in use"):
        first.key(0)


def test_a_read_only_folder_keeps_the_index_in_memory(tmp_path, triples):
    folder = tmp_path / "ro"
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        pack(folder / name, list(triples(["a", "b"])))
    folder.chmod(0o555)
    try:
        shards = ShardSet.open(folder)
        assert shards.num_samples == 4 and shards.key(3) == "1/b"
        assert not list(folder.glob("*.arrow*"))
        (note,) = shards.notes
        assert note.startswith("2 x the index cannot be written beside the tar") and "(0.tar, 1.tar)" in note
    finally:
        folder.chmod(0o755)


def test_sidecars_are_equal_for_equal_tars(tmp_path, triples):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_index(pack(tmp_path / folder / "0.tar", list(triples(["x", "y"]))), {"bpe": [[[1]], [[2], [3]]]})
    assert (tmp_path / "a/0.index.arrow").read_bytes() == (tmp_path / "b/0.index.arrow").read_bytes()


def test_real_shards_without_writing_there(vlkit_data):
    shards = ShardSet.open(vlkit_data / "tiny_imagenet_shards")
    assert shards.num_samples == 8000 and not shards.problems
    assert shards.shards[0].captions(0) and shards.shards[0].json(0)["class_name"] == shards.shards[0].captions(0)[0]
    assert not list((vlkit_data / "tiny_imagenet_shards").glob("*.arrow"))
    for shard in shards.shards:
        table = build_table(shard.path)
        assert table.num_rows == shard.num_samples
        expected = slow_samples(shard.path)
        assert [expected[shard.key(i)]["jpg"] for i in (0, 5, shard.num_samples - 1)] == [
            shard.image_bytes(i) for i in (0, 5, shard.num_samples - 1)
        ]


def test_map_table_names_what_it_cannot_read(tmp_path):
    (tmp_path / "x.index.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"x\.index\.arrow is no shard index, or was cut"):
        map_table(tmp_path / "x.index.arrow")
