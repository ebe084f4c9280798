"""`validate_shards` finds each kind of damage, names shard and key, and changes nothing."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from data_tools.build import build_shards
from data_tools.validate import validate_shards
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.shard_index import sidecar_path, write_index
from vlkit.errors import DataError


def image(seed, kind="JPEG", size=(40, 30)):
    random.seed(seed)
    pixels = Image.frombytes("RGB", size, random.randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    pixels.save(buffer, kind)
    return buffer.getvalue()


def sample(key, **changed):
    fields = {"jpg": image(key), "txt": f"caption of {key}".encode()} | changed
    return [(f"{key}.{suffix}", content) for suffix, content in fields.items() if content is not None]


@pytest.fixture
def built(tmp_path):
    """Three shards of 4, 4 and 2 samples with two captions each."""
    records = tuple(Record(f"{i}.jpg", ImageRef(data=image(i)), (f"one {i}", f"two {i}"), i % 3) for i in range(10))
    source = Source(records, "table", tmp_path, ("cat", "dog", "fish"))
    out = tmp_path / "shards"
    build_shards(
        source, out, samples_per_shard=4, tokenizers={"letters": lambda texts: [[*map(ord, t)] for t in texts]}
    )
    return out


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_whole_shards_are_ok_and_left_alone(built):
    before = content(built)
    seen = []
    report = validate_shards(built, progress=lambda done, total: seen.append((done, total)))
    assert report.ok, report.lines()
    assert (report.num_shards, report.num_samples, report.num_captions, report.num_decoded) == (3, 10, 20, 10)
    assert report.lines() == ["3 shards, 10 samples with 20 captions, 10 images decoded: ok"]
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert content(built) == before


def test_foreign_shards_without_index_are_ok_and_none_is_written(tmp_path, write_tar):
    path = write_tar(tmp_path / "00000.tar", sample("a") + sample("b", jpg=None, png=image(1, "PNG")))
    report = validate_shards(tmp_path)
    assert report.ok
    assert set(report.notes.counts) == {
        "shard without index (it is made on first use)",
        "shard without stats file (not built by vlkit)",
    }
    assert not sidecar_path(path).exists()


def test_broken_samples_are_counted_by_cause_with_shard_and_key(tmp_path, write_tar):
    whole = image("cut")
    files = [
        *sample("fine"),
        *sample("text", jpg=b"no image at all"),
        *sample("cut", jpg=whole[: len(whole) // 2]),
        *sample("mute", txt=b" \n\n"),
        *sample("bare", txt=None),
        *sample("latin", txt="caf\xe9".encode("latin-1")),
        *sample("badjson", txt=None, json=b"[1, 2]"),
        *sample("badcls", cls=b"many"),
        *sample("labelled", txt=None, cls=b"3"),
        *sample("json", txt=None, json=json.dumps({"captions": ["one", "two", ""]}).encode()),
    ]
    write_tar(tmp_path / "00003.tar", files)
    report = validate_shards(tmp_path / "00003.tar")
    assert not report.ok
    assert report.problems.examples == {
        "image that does not decode: not an image": ["00003/text"],
        "image that does not decode: truncated": ["00003/cut"],
        "no caption": ["00003/mute", "00003/badjson"],
        "no caption and no label (kept)": ["00003/bare"],
        "caption that is not UTF-8": ["00003/latin"],
        "JSON that is no object": ["00003/badjson"],
        "label that is no whole number": ["00003/badcls"],
    }
    assert (report.num_samples, report.num_decoded) == (10, 8)


def test_truncated_tar(built):
    path = built / "00001.tar"
    path.write_bytes(path.read_bytes()[:10_000])  # inside one of four samples
    report = validate_shards(built)
    causes = "\n".join(report.lines())
    assert "cut" in causes
    assert "index that belongs to other contents of the tar: 00001.index.arrow (the index expects" in causes
    assert "stats that differ from the tar: 00001.stats.json: tar_bytes is" in causes
    assert "tar whose checksum differs from its stats: 00001.tar" in causes
    assert 6 < report.num_samples < 10


def test_one_flipped_bit_in_an_image_is_found_by_the_checksum(built):
    """No decoder needs to notice it; the size, the names and the index all still fit."""
    path = built / "00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
    data[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(data)
    assert validate_shards(built).problems.examples["tar whose checksum differs from its stats"] == ["00000.tar"]


def test_shard_that_is_no_tar_does_not_hide_the_others(built):
    (built / "00001.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    report = validate_shards(built)
    assert "00001.tar (" in report.problems.examples["shard that cannot be opened"][0]
    assert report.num_decoded == 6


def test_duplicate_keys_within_and_across_shards(tmp_path, write_tar):
    write_tar(tmp_path / "0.tar", sample("a") + sample("b") + sample("a"))
    write_tar(tmp_path / "1.tar", sample("b") + sample("c"))
    report = validate_shards(tmp_path)
    assert report.problems.counts == {"duplicate key": 2, "key that occurs in several shards": 2}
    assert report.problems.examples["duplicate key"] == ["0/a", "0/a"]
    assert report.problems.examples["key that occurs in several shards"] == ["0/b", "1/b"]


def test_copied_shard(built):
    (built / "00009.tar").write_bytes((built / "00000.tar").read_bytes())
    report = validate_shards(built)
    assert report.problems.examples["shard with the contents of another"] == ["00009.tar = 00000.tar"]
    assert "key that occurs in several shards" not in report.problems.counts


def test_keys_with_two_dots(tmp_path, write_tar):
    files = [("a.v1.jpg", image(1)), ("a.v1.txt", b"x"), ("b.v1.jpg", image(2)), ("b.v2.jpg", image(3))]
    report = validate_shards(write_tar(tmp_path / "0.tar", files))
    assert report.notes.examples["key with two dots"] == ["0/a"]
    assert any(cause.startswith("key with two dots") for cause in report.problems.counts)


def test_index_of_another_tar_with_the_same_size(built):
    sidecar_path(built / "00000.tar").write_bytes(sidecar_path(built / "00001.tar").read_bytes())
    assert any("other contents" in cause for cause in validate_shards(built).problems.counts)


def test_index_with_wrong_places_is_found_by_walking_the_tar(built):
    """Places of two samples swapped: sizes and identity fit, only the images are those of other captions."""
    import pyarrow as pa

    from vlkit.data.shard_sidecar import map_table, write_table

    path = sidecar_path(built / "00000.tar")
    table = map_table(path)
    position = table.column_names.index("image_offset")
    swapped = table.column("image_offset").to_pylist()
    swapped[0], swapped[1] = swapped[1], swapped[0]
    write_table(table.set_column(position, "image_offset", pa.array(swapped)), path)
    problems = validate_shards(built).problems
    assert problems.examples == {"index whose keys or places differ from the tar's": ["00000.index.arrow"]}


def test_broken_index_and_token_ids_of_other_captions(built):
    sidecar_path(built / "00000.tar").write_bytes(b"ARROW1 but not really")
    write_index(built / "00001.tar", {"letters": [[[1], [2]], [[1]], [[1], [2]], [[1], [2], [3]]]})
    problems = validate_shards(built).problems
    assert "00000.index.arrow (" in problems.examples["index that cannot be read"][0]
    assert problems.examples["token ids of letters for another number of captions"] == [
        "00001/000010001",
        "00001/000010003",
    ]


def test_missing_and_wrong_stats(built):
    (built / "00000.stats.json").unlink()
    stats = json.loads((built / "00001.stats.json").read_text())
    (built / "00001.stats.json").write_text(json.dumps(stats | {"num_samples": 5, "num_captions": 9}))
    (built / "00002.stats.json").write_text("{")
    problems = validate_shards(built).problems
    assert problems.examples["shard without stats file: its build did not finish it"] == ["00000.tar"]
    assert problems.examples["stats that differ from the tar"] == [
        "00001.stats.json: num_samples is 5, found 4",
        "00001.tar: num_captions is 9, found 8",
    ]
    assert problems.examples["stats file that cannot be read"] == ["00002.stats.json"]
    assert problems.counts["unfinished build"] == 1


def test_workers_find_the_same(tmp_path, write_tar):
    for number in range(2):
        files = [entry for i in range(4) for entry in sample(f"{number}{i}")]
        write_tar(tmp_path / f"{number}.tar", files + sample(f"{number}x", jpg=b"x"))
    alone, together = validate_shards(tmp_path), validate_shards(tmp_path, workers=2)
    assert alone.to_json() == together.to_json()
    assert alone.problems.counts == {"image that does not decode: not an image": 2}


def test_report_is_json_and_safe_for_a_terminal(tmp_path, write_tar):
    write_tar(tmp_path / "0.tar", sample("\x1b[31mred", jpg=b"x"))
    report = validate_shards(tmp_path)
    assert "\x1b" not in "".join(report.lines())
    assert "\\x1b[31mred" in "".join(report.lines())
    values = json.loads(json.dumps(report.to_json()))
    assert values["ok"] is False
    assert values["problems"] == [
        {"cause": "image that does not decode: not an image", "count": 1, "examples": ["0/\x1b[31mred"]}
    ]


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match=r"No \.tar files"):
        validate_shards(tmp_path)
