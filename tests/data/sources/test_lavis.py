"""ALBEF's, BLIP's and LAVIS's annotation files."""

import json

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import DataError

COCO_TEST = [
    {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man .", "A man with a helmet."]},
    {"image": "val2014/COCO_val2014_000000060623.jpg", "caption": ["A girl."]},
]
COCO_TRAIN = [
    {"caption": "A boat.", "image": "train2014/COCO_train2014_000000000009.jpg", "image_id": "coco_9"},
    {"caption": "A ship.", "image": "train2014/COCO_train2014_000000000009.jpg", "image_id": "coco_9"},
    {"caption": "A van.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"},
]


def write(root, name, rows):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(rows))
    return root / name


def image(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(name.encode())


def test_coco_with_images_of_either_release(tmp_path):
    file = write(tmp_path / "annotations", "coco_karpathy_test.json", COCO_TEST)
    image(tmp_path, "val2014/COCO_val2014_000000391895.jpg")
    image(tmp_path, "train2017/000000060623.jpg")
    source = read_source(file)
    assert (source.format, [record.split for record in source]) == ("lavis", ["test", "test"])
    assert [record.captions for record in source] == [("A man .", "A man with a helmet."), ("A girl.",)]
    assert source.records[1].image.read() == b"train2017/000000060623.jpg"


def test_training_rows_are_grouped_and_splits_come_from_the_names(tmp_path):
    write(tmp_path, "coco_karpathy_test.json", COCO_TEST)
    write(tmp_path, "coco_karpathy_train.json", COCO_TRAIN)
    for rows in (COCO_TEST, COCO_TRAIN):
        for row in rows:
            image(tmp_path, row["image"])
    source = read_source(tmp_path)
    assert (source.format, len(source)) == ("lavis", 4)
    train = read_source(tmp_path, split="train")
    assert [(record.key, record.captions) for record in train] == [
        ("train2014/COCO_train2014_000000000009.jpg", ("A boat.", "A ship.")),
        ("val2014/COCO_val2014_000000522418.jpg", ("A van.",)),
    ]
    with pytest.raises(DataError, match=r"No split 'val'"):
        read_source(tmp_path, split="val")


def test_flickr30k_with_the_images_elsewhere(tmp_path):
    rows = [{"image": "flickr30k-images/1007129816.jpg", "caption": ["a", "b"]}, {"image": "x.jpg"}, 3]
    file = write(tmp_path / "json", "flickr30k_test.json", rows)
    image(tmp_path / "images", "1007129816.jpg")
    source = read_source(file, images=tmp_path / "images")
    assert [record.captions for record in source] == [("a", "b")]
    assert dict(source.problems.counts) == {"row without caption": 1, "row without image": 1}


def test_two_data_sets_in_one_folder(tmp_path):
    write(tmp_path, "coco_karpathy_test.json", COCO_TEST)
    write(tmp_path, "flickr30k_test.json", COCO_TEST)
    with pytest.raises(DataError, match=r"holds several data sets"):
        read_source(tmp_path)


def test_not_a_list(tmp_path):
    with pytest.raises(DataError, match=r"is no list of objects, but a dict"):
        read_source(write(tmp_path, "coco_karpathy_val.json", {"images": []}))
