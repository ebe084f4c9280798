"""What the format of a path is guessed to be, and when guessing is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlkit.data.sources import FORMATS, read_source
from vlkit.data.sources.options import SourceOptions
from vlkit.data.sources.sniff import guess_format
from vlkit.errors import DataError

KARPATHY = json.dumps({"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "x"}]}]})
COCO = json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]})

CASES = {
    "folder": [("a.jpg", "x"), ("notes.txt", "x")],
    "table": [("pairs.csv", "image,caption\na.jpg,x\n"), ("a.jpg", "x")],
    "karpathy": [("dataset_coco.json", KARPATHY), ("val2014/a.jpg", "x")],
    "coco": [("annotations/captions_val2017.json", COCO), ("val2017/a.jpg", "x")],
    "webdataset": [("00000.tar", "x"), ("00000_stats.json", "{}")],
    "flickr8k": [("Flickr8k.token.txt", "a.jpg#0\tx\n"), ("dataset_flickr8k.json", KARPATHY), ("Images/a.jpg", "x")],
    "lavis": [("coco_karpathy_test.json", "[]"), ("val2014/a.jpg", "x")],
    "coop": [("split_zhou_Pets.json", '{"train": [], "test": []}'), ("images/a.jpg", "x")],
    "clip_benchmark": [("flickr30k_test_karpathy.txt", "image,caption\na.jpg,x\n"), ("Images/a.jpg", "x")],
    "caption_files": [("00000/000000000.jpg", "x"), ("00000/000000000.txt", "x"), ("00000_stats.json", "{}")],
    "parquet": [("00000_stats.json", "{}")],  # and 00000.parquet, which is no text
    "flickr30k": [("results.csv", "image_name| comment_number| comment\n"), ("flickr30k_images/a.jpg", "x")],
}


def lay_out(root, files):
    for name, text in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def guess(path, **options):
    return guess_format(path, SourceOptions(**options))


def test_every_format_has_a_case():
    assert set(CASES) == set(FORMATS)


@pytest.mark.parametrize("expected", CASES)
def test_folders(tmp_path, expected):
    lay_out(tmp_path, CASES[expected])
    if expected == "parquet":
        pq.write_table(pa.table({"jpg": [b"x"], "caption": ["x"]}), tmp_path / "00000.parquet")
    assert guess(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.tar", "", "webdataset"),
        ("x.jsonl", "", "table"),
        ("x.json", "[]", "table"),
        ("x.json", KARPATHY, "karpathy"),
        ("captions.json", COCO, "coco"),
        ("coco_karpathy_val.json", "[]", "lavis"),
        ("coco_val_karpathy.json", COCO, "clip_benchmark"),
        ("results_20130124.token", "", "flickr30k"),
        ("results.csv", "image_name| comment_number| comment", "flickr30k"),
        ("results.csv", "image,caption", "table"),
        ("captions.txt", "image,caption\n", "flickr8k"),
        ("x.PNG", "", "folder"),
    ],
)
def test_files(tmp_path, name, text, expected):
    lay_out(tmp_path, [(name, text)])
    assert guess(tmp_path / name) == expected


@pytest.mark.parametrize("spec", ["s/{00000..00002}.tar", "s/*.tar", "a.tar::b.tar"])
def test_shard_patterns(tmp_path, spec):
    assert guess(tmp_path / spec) == "webdataset"


def test_split_folders_of_tars(tmp_path):
    lay_out(tmp_path, [("train/00000.tar", ""), ("test/00000.tar", "")])
    assert guess(tmp_path) == "webdataset"


def test_ambiguity_lists_the_candidates(tmp_path):
    lay_out(tmp_path, CASES["table"] + CASES["karpathy"])
    with pytest.raises(DataError) as error:
        read_source(tmp_path)
    assert "could be read in 2 ways; say which by --format:" in str(error.value)
    assert "--format karpathy: dataset_coco.json" in str(error.value)
    assert "--format table: pairs.csv" in str(error.value)


def test_table_of_unknown_columns_beside_images_is_not_passed_over(tmp_path):
    lay_out(tmp_path, [("metadata.csv", "file,name\na.jpg,x\n"), ("images/a.jpg", "x")])
    with pytest.raises(
        DataError, match=r"(?s)--format table: metadata\.csv has the columns file, name .*--format folder"
    ):
        guess(tmp_path)
    assert guess(tmp_path, image_column="file") == "table"


@pytest.mark.parametrize(("name", "text"), [("x.pdf", ""), ("x.json", '{"a": 1}')])
def test_unknown_files(tmp_path, name, text):
    lay_out(tmp_path, [(name, text)])
    with pytest.raises(DataError, match=r"Cannot tell the format of|looks like neither"):
        guess(tmp_path / name)


def test_embeddings_are_no_images(tmp_path):
    lay_out(tmp_path, [("img_emb/img_emb_0.npy", ""), ("metadata/metadata_0.parquet", "")])
    with pytest.raises(DataError, match=r"holds embeddings .*no images"):
        guess(tmp_path)
