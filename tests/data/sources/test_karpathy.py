"""Karpathy's split files over miniatures of the official image trees."""

import json

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import DataError


def entry(filename, split, captions, **more):
    sentences = [
        {"raw": text, "tokens": text.lower().split(), "imgid": 0, "sentid": i} for i, text in enumerate(captions)
    ]
    return {"filename": filename, "imgid": 0, "split": split, "sentids": [0], "sentences": sentences, **more}


def write(folder, name, entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"dataset": name, "images": entries}))
    return folder / name


def put(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.parent.name.encode())


def coco_entry(identifier, folder, split):
    name = f"COCO_{folder}_{identifier:012d}.jpg"
    return entry(name, split, [f" Caption {identifier}. ", "Two"], filepath=folder, cocoid=identifier)


COCO = [
    coco_entry(9, "train2014", "train"),
    coco_entry(42, "val2014", "restval"),
    coco_entry(391895, "val2014", "test"),
    coco_entry(184613, "val2014", "val"),
]


def test_coco_2014_tree(tmp_path):
    write(tmp_path, "dataset_coco.json", COCO)
    put(*(tmp_path / row["filepath"] / row["filename"] for row in COCO))
    source = read_source(tmp_path, split="test")
    assert source.format == "karpathy"
    (record,) = source
    assert record.key == "COCO_val2014_000000391895.jpg"
    assert record.captions == ("Caption 391895.", "Two")  # raw, stripped, case kept
    assert record.image.read() == b"val2014"


def test_restval_counts_as_train(tmp_path):
    write(tmp_path, "dataset_coco.json", COCO)
    put(*(tmp_path / row["filepath"] / row["filename"] for row in COCO))
    assert [record.key for record in read_source(tmp_path, split="train")] == [row["filename"] for row in COCO[:2]]
    assert [record.split for record in read_source(tmp_path)] == ["train", "train", "test", "val"]


@pytest.mark.parametrize("place", [".", "annotations", "karpathy"])
def test_coco_ids_in_the_2017_folders_and_json_in_a_folder_of_its_own(tmp_path, place):
    file = write(tmp_path / place, "dataset_coco.json", COCO)
    put(tmp_path / "train2017" / "000000391895.jpg", tmp_path / "val2017" / "000000184613.jpg")
    assert [record.image.read() for record in read_source(file, split="test")] == [b"train2017"]
    assert [record.image.read() for record in read_source(file, split="dev")] == [b"val2017"]


@pytest.mark.parametrize(
    "folder", [".", "Images", "images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset"]
)
def test_customary_image_folders(tmp_path, folder):
    file = write(tmp_path, "dataset_flickr30k.json", [entry("1000092795.jpg", "test", ["Two men."])])
    put(tmp_path / folder / "1000092795.jpg")
    assert [record.captions for record in read_source(file)] == [("Two men.",)]


def test_images_elsewhere(tmp_path):
    file = write(tmp_path / "json", "dataset_flickr8k.json", [entry("a.jpg", "train", ["x"])])
    put(tmp_path / "photos" / "Images" / "a.jpg")
    assert len(read_source(file, images=tmp_path / "photos")) == 1
    assert len(read_source(file, images=tmp_path / "photos" / "Images")) == 1


def test_missing_images_print_the_tree(tmp_path):
    write(tmp_path, "dataset_flickr30k.json", [entry("1.jpg", "test", ["x"])])
    with pytest.raises(DataError, match=r"None of the 1 images[\s\S]*flickr30k/flickr30k-images/1000092795\.jpg"):
        read_source(tmp_path, split="test")


def test_some_missing_images_are_counted_in_the_split_only(tmp_path):
    entries = [entry("a.jpg", "test", ["x"]), entry("b.jpg", "test", ["y"]), entry("c.jpg", "train", ["z"])]
    write(tmp_path, "dataset_flickr8k.json", entries)
    put(tmp_path / "Images" / "a.jpg")
    assert read_source(tmp_path, split="test").problems.examples == {"image file missing": ["b.jpg"]}


def test_bad_entries_are_counted(tmp_path):
    entries = [
        entry("a.jpg", "test", ["x"]),
        entry("a.jpg", "val", ["y"]),
        {"filename": "c.jpg"},
        entry("b.jpg", "test", []),
    ]
    write(tmp_path, "dataset_flickr8k.json", entries)
    put(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert read_source(tmp_path).problems.examples == {
        "file name that stands twice": ["dataset_flickr8k.json images[1]"],
        "image entry without filename, split or sentences": ["dataset_flickr8k.json images[2]"],
        "image without caption": ["b.jpg"],
    }


def test_several_files_need_a_choice(tmp_path):
    for name in ("dataset_coco.json", "dataset_flickr8k.json"):
        write(tmp_path, name, [entry("a.jpg", "test", ["x"])])
    with pytest.raises(DataError, match=r"several Karpathy files: dataset_coco\.json, dataset_flickr8k\.json\. Name"):
        read_source(tmp_path)


def test_unknown_split(tmp_path):
    write(tmp_path, "dataset_flickr8k.json", [entry("a.jpg", "test", ["x"])])
    with pytest.raises(DataError, match=r"No split 'train' in .*dataset_flickr8k\.json\. Present: test\."):
        read_source(tmp_path, split="train")
