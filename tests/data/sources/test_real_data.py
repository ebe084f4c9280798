"""The sources on real data sets, against the counts their authors publish."""

import os
from pathlib import Path

import pytest

from vlkit.data.sources import read_source
from vlkit.data.sources.flickr import _listed_splits
from vlkit.errors import DataError

DATA = os.environ.get("VLKIT_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="VLKIT_DATA is not set")


def data(name):
    path = Path(DATA) / name
    if not path.exists():
        pytest.skip(f"{name} is not in VLKIT_DATA")
    return path


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("dev", 1000), ("test", 1000)])
def test_flickr8k_splits(split, count):
    source = read_source(data("flickr8k"), split=split)
    assert (source.format, len(source)) == ("flickr8k", count)
    assert {len(record.captions) for record in source} == {5}


def test_flickr8k_names_the_image_that_does_not_exist():
    source = read_source(data("flickr8k"))
    assert len(source) == 8091
    assert "2258277193_586949ec62.jpg.1" in source.problems.examples["image file missing"]


def test_flickr8k_test_split_repeats_seven_captions():
    texts = [caption for record in read_source(data("flickr8k"), split="test") for caption in record.captions]
    assert (len(texts), len(texts) - len(set(texts))) == (5000, 7)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_karpathy_file_gives_the_records_of_the_token_file(split):
    folder = data("flickr8k")
    karpathy = read_source(folder / "dataset_flickr8k.json", split=split)
    assert karpathy.format == "karpathy"
    assert karpathy.records == read_source(folder, format="flickr8k", split=split).records


def test_flickr8k_aspect_kaggle_captions():
    source = read_source(data("flickr8k_aspect"))
    assert (source.format, len(source), sum(len(record.captions) for record in source)) == ("flickr8k", 400, 2000)
    truth = {record.key: record.captions for record in read_source(data("flickr8k"))}
    assert all(truth[record.key] == record.captions for record in source)


def test_coco_small():
    source = read_source(data("coco_small"), split="val")
    assert (source.format, len(source), source.problems.total) == ("coco", 158, 0)
    assert all(len(record.captions) >= 5 and record.image.read()[:2] == b"\xff\xd8" for record in source)


def test_coco_captions_over_the_images_of_the_small_set():
    """The complete annotation file with 158 of its images: the rest is counted, the captions agree."""
    source = read_source(data("coco_annotations/captions_val2017.json"), images=data("coco_small"))
    assert (len(source), source.problems.counts["image file missing"]) == (158, 5000 - 158)
    small = {record.key: record.captions for record in read_source(data("coco_small"))}
    assert {record.key: record.captions for record in source} == small


def test_coco_annotations_without_images():
    with pytest.raises(DataError, match=r"None of the 5000 images"):
        read_source(data("coco_annotations"))


def test_caltech101():
    source = read_source(data("caltech101"))
    assert (source.format, len(source), len(source.class_names)) == ("folder", 3030, 101)
    assert [sum(record.label == label for record in source) for label in range(101)] == [30] * 101
    assert all(source.class_names[record.label] == record.key.split("/")[0] for record in source)


def test_cifar10():
    source = read_source(data("cifar10_test"))
    assert (len(source), source.class_names[:3]) == (2000, ("airplane", "automobile", "bird"))


def test_noto_emoji_by_column_names():
    folder = data("noto_emoji")
    source = read_source(folder, image_column="file", caption_column="name")
    assert (source.format, len(source), source.problems.total) == ("table", 1903, 0)
    assert source.records[0].captions == ("keycap #",)
    with pytest.raises(DataError, match="could be read in 2 ways"):
        read_source(folder)


def test_flickr30k_split_lists():
    folder = data("flickr30k_entities_splits")
    splits = _listed_splits({split: folder / f"{split}.txt" for split in ("train", "val", "test")}, ".jpg")
    counts = {split: list(splits.values()).count(split) for split in ("train", "val", "test")}
    assert counts == {"train": 29783, "val": 1000, "test": 1000}
    assert splits["1016887272.jpg"] == "test"


def test_tiny_imagenet_shards():
    source = read_source(data("tiny_imagenet_shards"))
    assert (source.format, len(source)) == ("webdataset", 8000)
    assert len({record.captions for record in source}) == 200
    assert source.records[-1].image.read()[:2] == b"\xff\xd8"
