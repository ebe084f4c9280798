"""What CLIP_benchmark lays on disk: its caption files, and its `wds` layout of tars."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.build import build_shards
from vlkit.data.sources import read_source
from vlkit.errors import DataError

COCO = {
    "images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", "height": 1, "width": 1}],
    "annotations": [{"id": n, "image_id": 391895, "caption": text} for n, text in enumerate(("A man.", "A bike."))],
    "info": {},
    "licenses": [],
}


def put(root, name, data=b"x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root / name


@pytest.fixture
def put_tar(write_tar):
    """`put_tar(path, {"jpg": b"..."}, ...)`: samples by suffix, named by their number."""

    def put(path, *samples):
        files = ((number, suffix, data) for number, sample in enumerate(samples) for suffix, data in sample.items())
        write_tar(path, ((f"s{number:07d}.{suffix}", data) for number, suffix, data in files))

    return put


def array(values):
    stream = io.BytesIO()
    np.save(stream, np.array(values))
    return stream.getvalue()


def test_coco_file(tmp_path):
    put(tmp_path, "coco_test_karpathy.json", json.dumps(COCO))
    put(tmp_path, "val2014/COCO_val2014_000000391895.jpg")
    for place in (tmp_path, tmp_path / "coco_test_karpathy.json"):
        source = read_source(place, split="test")
        assert source.format == "clip_benchmark"
        assert [(record.captions, record.split) for record in source] == [(("A man.", "A bike."), "test")]


def test_flickr_file(tmp_path):
    lines = [
        "image,caption",
        "12.jpg,A man, a plan, a canal.",
        "12.jpg,He says .jpg,is odd.",
        "13.jpg,One",
        "rubbish",
        "",
    ]
    file = put(tmp_path, "flickr30k_val_karpathy.txt", "\n".join(lines))
    put(tmp_path, "Images/12.jpg")
    source = read_source(file)
    assert [(record.key, record.captions, record.split) for record in source] == [
        ("12.jpg", ("A man, a plan, a canal.", "He says .jpg,is odd."), "val")
    ]
    assert dict(source.problems.counts) == {"line that is not 'name.jpg,caption'": 1, "image file missing": 1}
    put(tmp_path, "flickr30k_val_karpathy.txt", "12.jpg,A man\n")
    with pytest.raises(DataError, match=r"has no header line"):
        read_source(file)


def test_two_data_sets_in_one_folder(tmp_path):
    put(tmp_path, "coco_test_karpathy.json", json.dumps(COCO))
    put(tmp_path, "flickr8k_test_karpathy.txt", "image,caption\n")
    with pytest.raises(DataError, match=r"holds several data sets"):
        read_source(tmp_path)


def test_wds_classification(tmp_path, put_tar):
    put(tmp_path, "classnames.txt", "cat\ndog\nbird\n")
    put(tmp_path, "zeroshot_classification_templates.txt", "a photo of a {c}.\na blurry {c}, a {c}.\n")
    put(tmp_path, "dataset_type.txt", "classification\n")
    for split, labels in (("train", b"01"), ("test", b"2")):
        put(tmp_path / split, "nshards.txt", str(len(labels)))
        for number, label in enumerate(labels):
            put_tar(tmp_path / split / f"{number}.tar", {"webp": b"image", "cls": bytes([label])})
    source = read_source(tmp_path)
    assert (source.format, source.class_names) == ("webdataset", ("cat", "dog", "bird"))
    assert source.templates == ("a photo of a {}.", "a blurry {}, a {}.")
    assert [(record.key, record.split, record.label) for record in source] == [
        ("test/0/s0000000", "test", 2),
        ("train/0/s0000000", "train", 0),
        ("train/1/s0000000", "train", 1),
    ]
    assert [record.label for record in read_source(tmp_path, split="test")] == [2]
    (tmp_path / "train" / "1.tar").unlink()
    assert len(read_source(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match=r"has 1 of 2 tars \(missing: 1\.tar\)\. Download it again"):
        read_source(tmp_path, split="train")


def test_wds_retrieval(tmp_path, put_tar):
    put(tmp_path, "dataset_type.txt", "retrieval")
    put_tar(tmp_path / "test" / "0.tar", {"jpg": b"image", "txt": b"one\ntwo\nthree"})
    assert read_source(tmp_path, split="test").records[0].captions == ("one", "two", "three")


def test_wds_multi_label(tmp_path, put_tar):
    put(tmp_path, "classnames.txt", "cat\ndog\nbird\n")
    put(tmp_path, "dataset_type.txt", "multilabel")
    values = ([1, 0, 1], [0, 0, 0], [0, 2, 0])
    put_tar(tmp_path / "test" / "0.tar", *({"png": b"image", "npy": array(value)} for value in values))
    source = read_source(tmp_path)
    assert [(record.labels, record.label) for record in source] == [((0, 2), None), ((), None)]
    assert source.class_names == ("cat", "dog", "bird")
    assert source.problems.lines()[0].startswith("1 x label or captions that cannot be read: test/0/s0000002 (")
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    put_tar(tmp_path / "test" / "0.tar", {"png": stream.getvalue(), "npy": array([1, 0, 1])})
    build_shards(read_source(tmp_path), tmp_path / "built")
    again = read_source(tmp_path / "built")
    assert [(record.labels, record.captions, record.split) for record in again] == [((0, 2), ("cat", "bird"), "test")]
    assert again.class_names == ("cat", "dog", "bird")
    put_tar(tmp_path / "test" / "0.tar", {"png": b"image", "npy": array([{"a": 1}])})
    with pytest.raises(DataError, match=r"(?s)Object arrays cannot be loaded"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("dataset_type.txt", "segmentation", r"dataset_type\.txt says 'segmentation', expected classification"),
        ("test/nshards.txt", "many", r"holds 'many', expected the number of tars"),
        ("zeroshot_classification_templates.txt", "a photo", r"the template 'a photo' has no \{c\}"),
    ],
)
def test_wds_side_files_of_other_content(tmp_path, name, text, expected, put_tar):
    put_tar(tmp_path / "test" / "0.tar", {"jpg": b"image", "cls": b"0"})
    put(tmp_path, name, text)
    with pytest.raises(DataError, match=expected):
        read_source(tmp_path)
