"""Images with caption files beside them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def lay_out(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def img2dataset(root):
    """What `img2dataset --output_format files` leaves: successes only, a table of all rows beside the folder."""
    for shard in ("00000", "00001"):
        for row in (0, 2):
            key = f"{shard}{row:04d}"
            about = json.dumps({"caption": f"caption {key}", "key": key, "status": "success"})
            lay_out(root / shard, {f"{key}.jpg": key, f"{key}.txt": f"caption {key}", f"{key}.json": about})
        pq.write_table(pa.table({"url": ["u"] * 3, "caption": ["c"] * 3, "key": ["0"] * 3}), root / f"{shard}.parquet")
        (root / f"{shard}_stats.json").write_text("{}")


def test_img2dataset_files(tmp_path):
    img2dataset(tmp_path)
    source = read_source(tmp_path)
    assert source.format == "caption_files"
    assert [(record.key, record.captions) for record in source] == [
        (f"{key[:5]}/{key}.jpg", (f"caption {key}",)) for key in ("000000000", "000000002", "000010000", "000010002")
    ]
    assert source.records[3].image.read() == b"000010002"
    assert not source.problems.lines()


def test_captions_by_line_from_json_and_missing(tmp_path):
    lay_out(tmp_path, {"a.jpg": "a", "a.txt": "one\ntwo\n", "b.png": "b", "b.json": '{"caption": "three"}'})
    lay_out(tmp_path, {"c.jpg": "c", "d.jpg": "d", "d.json": "{", "notes.md": "x"})
    source = read_source(tmp_path)
    assert source.format == "caption_files"
    assert [record.captions for record in source] == [("one", "two"), ("three",)]
    assert dict(source.problems.counts) == {"image without caption": 1, "caption file that cannot be read": 1}


def test_class_folders_with_texts_are_ambiguous(tmp_path):
    lay_out(tmp_path, {"cat/a.jpg": "x", "cat/a.txt": "a cat", "dog/b.jpg": "x"})
    with pytest.raises(DataError, match=r"(?s)2 ways.*--format caption_files: cat/a\.jpg.*--format folder"):
        read_source(tmp_path)
    assert read_source(tmp_path, format="folder").class_names == ("cat", "dog")
    assert len(read_source(tmp_path, format="caption_files")) == 1


def test_refusals(tmp_path):
    lay_out(tmp_path, {"a.jpg": "a"})
    with pytest.raises(DataError, match=r"(?s)No image with a caption file.*Expected for --format caption_files"):
        read_source(tmp_path, format="caption_files")
    with pytest.raises(ConfigError, match=r"--split has no effect"):
        read_source(tmp_path, format="caption_files", split="train")
