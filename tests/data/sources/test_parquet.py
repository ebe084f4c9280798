"""Parquet with images in it, as img2dataset and the Hub write it, and cells read one at a time."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.build import build_shards
from vlkit.data.parquet_cells import read_cell
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def jpeg(red):
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (red, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write(path, columns, metadata=None, row_group_size=None, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns, schema=schema)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=row_group_size)
    return path


def img2dataset(path, num_rows=5, lost=(2,), encoding="jpg"):
    """The columns `img2dataset --output_format parquet` writes, in its order."""
    present = [row not in lost for row in range(num_rows)]
    columns = {
        "url": [f"http://host/{row}.jpg" for row in range(num_rows)],
        "key": [f"{row:09d}" for row in range(num_rows)],
        "status": ["success" if there else "failed_to_download" for there in present],
        "error_message": [None if there else "<urlopen error timed out>" for there in present],
        "width": [8 if there else None for there in present],
        "height": [6 if there else None for there in present],
        "sha256": [None] * num_rows,
        "caption": [f"caption {row}" for row in range(num_rows)],
        encoding: pa.array([jpeg(row) if there else None for row, there in enumerate(present)], pa.binary()),
    }
    return write(path, columns, row_group_size=2)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_metadata(**features):
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, **features}}})}


def test_img2dataset(tmp_path):
    source = read_source(img2dataset(tmp_path / "00000.parquet"))
    assert source.format == "parquet"
    assert [(record.key, record.captions) for record in source] == [
        (f"{row:09d}", (f"caption {row}",)) for row in (0, 1, 3, 4)
    ]
    assert [record.image.read() for record in source] == [jpeg(row) for row in (0, 1, 3, 4)]
    assert dict(source.problems.counts) == {"row without image (its download failed)": 1}


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_other_encodings_and_several_files(tmp_path, encoding):
    for number in range(2):
        img2dataset(tmp_path / f"0000{number}.parquet", encoding=encoding, lost=())
        (tmp_path / f"0000{number}_stats.json").write_text("{}")
    source = read_source(tmp_path)
    assert (source.format, len(source)) == ("parquet", 10)
    assert source.records[7].image.read() == jpeg(2)


def test_hub_classes(tmp_path):
    label = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    columns = {
        "image": pa.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(3)], IMAGE),
        "label": pa.array([1, 0, -1], pa.int64()),
    }
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", columns, hub_metadata(label=label))
    source = read_source(tmp_path)
    assert (source.format, source.class_names) == ("parquet", ("cat", "dog"))
    assert [(record.split, record.label) for record in source] == [
        ("test", 1), ("test", 0), ("train", 1), ("train", 0)
    ]  # fmt: skip
    assert dict(source.problems.counts) == {"row without caption": 2}  # the label -1: not given
    only = read_source(tmp_path, split="train")
    assert [record.key for record in only] == [f"train-00000-of-00001/{row:06d}" for row in (0, 1)]
    assert only.records[1].image.read() == jpeg(1)
    with pytest.raises(DataError, match=r"No split 'val'.*Present: train, test"):
        read_source(tmp_path, split="val")


def test_hub_captions_as_lists(tmp_path):
    columns = {
        "image": pa.array([{"bytes": jpeg(i), "path": None} for i in range(2)], IMAGE),
        "caption": pa.array([["a", " b "], ["c", ""]], pa.list_(pa.string())),
        "split": ["test", "validation"],
    }
    source = read_source(write(tmp_path / "pairs.parquet", columns, hub_metadata()))
    assert [(record.captions, record.split) for record in source] == [(("a", "b"), "test"), (("c",), "val")]


def test_hub_rows_that_name_a_file(tmp_path):
    (tmp_path / "here.jpg").write_bytes(jpeg(9))
    rows = [{"bytes": None, "path": "here.jpg"}, {"bytes": None, "path": "gone.jpg"}, None]
    columns = {"image": pa.array(rows, IMAGE), "caption": ["x", "y", "z"]}
    source = read_source(write(tmp_path / "t.parquet", columns))
    assert [record.image.read() for record in source] == [jpeg(9)]
    assert source.problems.total == 2


def test_columns_by_name(tmp_path):
    columns = {"photo_data": pa.array([jpeg(1)], pa.large_binary()), "alt": ["x"], "caption": ["y"]}
    path = write(tmp_path / "t.parquet", columns)
    with pytest.raises(DataError, match=r"no column filepath"):
        read_source(path)
    source = read_source(path, format="parquet", image_column="photo_data", caption_column="alt")
    assert source.records[0].captions == ("x",)
    assert source.records[0].image.read() == jpeg(1)
    with pytest.raises(ConfigError, match=r"column 'alt_text'.*not found"):
        read_source(path, format="parquet", image_column="photo_data", caption_column="alt_text")


def test_a_parquet_of_paths_is_a_table(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    path = write(tmp_path / "t.parquet", {"filepath": ["a.jpg", "a.jpg"], "caption": ["x", "y"]})
    for place in (path, tmp_path):
        source = read_source(place)
        assert (source.format, source.records[0].captions) == ("table", ("x", "y"))


def test_a_parquet_of_links_names_the_download(tmp_path):
    path = write(tmp_path / "t.parquet", {"URL": ["http://host/a.jpg"], "TEXT": ["x"]})
    with pytest.raises(DataError, match=r"holds links, not images .*vlkit shards build .*--url-column URL --out"):
        read_source(path)


def test_side_files_of_tars_are_no_source(tmp_path):
    img2dataset(tmp_path / "00000.parquet")
    (tmp_path / "00000.tar").write_bytes(b"")
    from vlkit.data.sources.options import SourceOptions
    from vlkit.data.sources.sniff import guess_format

    assert guess_format(tmp_path, SourceOptions()) == "webdataset"


def test_a_cut_file(tmp_path):
    path = img2dataset(tmp_path / "00000.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"no readable parquet file"):
        read_source(path)


def test_cells(tmp_path):
    path = str(img2dataset(tmp_path / "00000.parquet"))
    assert [read_cell(path, row, "jpg") for row in (4, 0, 1)] == [jpeg(4), jpeg(0), jpeg(1)]
    with pytest.raises(DataError, match=r"row 2, column jpg holds nothing"):
        read_cell(path, 2, "jpg")
    with pytest.raises(DataError, match=r"row 5.*the file has 5 rows"):
        read_cell(path, 5, "jpg")
    with pytest.raises(DataError, match=r"column caption holds a str"):
        read_cell(path, 0, "caption")
    with pytest.raises(DataError, match=r"Cannot read"):
        read_cell(path, 0, "png")
    with pytest.raises(DataError, match=r"Cannot read"):
        read_cell(str(tmp_path / "gone.parquet"), 0, "jpg")


def test_shards_are_built_from_parquet(tmp_path):
    build_shards(read_source(img2dataset(tmp_path / "00000.parquet")), tmp_path / "out", shuffle=True)
    found = {record.captions: record.image.read() for record in read_source(tmp_path / "out")}
    assert found == {(f"caption {row}",): jpeg(row) for row in (0, 1, 3, 4)}
