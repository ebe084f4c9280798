"""COCO captions in miniatures of the official trees of 2014 and 2017."""

import json

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import DataError


def write_coco(root, year, split, images):
    """`images`: id -> captions; file names as in the official release of that year."""
    stem = f"COCO_{split}2014_" if year == 2014 else ""
    names = {identifier: f"{stem}{identifier:012d}.jpg" for identifier in images}
    folder = root / f"{split}{year}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names.values():
        (folder / name).write_bytes(name.encode())
    rows = [(identifier, text) for identifier, captions in images.items() for text in captions]
    document = {
        "info": {},
        "licenses": [],
        "images": [
            {"id": identifier, "file_name": name, "height": 4, "width": 4} for identifier, name in names.items()
        ],
        "annotations": [{"id": 9000 + place, "image_id": i, "caption": text} for place, (i, text) in enumerate(rows)],
    }
    file = root / "annotations" / f"captions_{split}{year}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document))
    return file


@pytest.fixture
def coco2017(tmp_path):
    write_coco(tmp_path, 2017, "train", {9: ["a meal", "food"]})
    write_coco(tmp_path, 2017, "val", {397133: ["a man ", "a kitchen"], 37777: ["fruit", "oranges", "a table"]})
    return tmp_path


def test_official_2017_tree(coco2017):
    source = read_source(coco2017, split="val")
    assert source.format == "coco"
    assert [(record.key, record.captions) for record in source] == [
        ("000000397133.jpg", ("a man", "a kitchen")),
        ("000000037777.jpg", ("fruit", "oranges", "a table")),
    ]
    assert source.records[0].image.read() == b"000000397133.jpg"
    assert source.records[0].split == "val"


def test_without_split_all_of_one_release(coco2017):
    assert [record.split for record in read_source(coco2017)] == ["train", "val", "val"]


@pytest.mark.parametrize("path", ["annotations/captions_val2017.json", "annotations", "."])
def test_path_may_be_the_file_or_a_folder(coco2017, path):
    assert len(read_source(coco2017 / path, split="validation", format="coco")) == 2


def test_2014_names(tmp_path):
    file = write_coco(tmp_path, 2014, "val", {391895: ["a man on a bike"]})
    (record,) = read_source(file)
    assert (record.key, record.image.read()) == ("COCO_val2014_000000391895.jpg", b"COCO_val2014_000000391895.jpg")


def test_images_are_resolved_by_id_across_releases(tmp_path):
    """Annotations of 2014 with only the folders of 2017: val2014 was spread over train2017 and val2017."""
    file = write_coco(tmp_path, 2014, "val", {391895: ["a man on a bike"], 42: ["a dog"]})
    for old in (tmp_path / "val2014").iterdir():
        old.unlink()
    for folder, identifier in (("train2017", 391895), ("val2017", 42)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{identifier:012d}.jpg").write_bytes(folder.encode())
    assert [record.image.read() for record in read_source(file)] == [b"train2017", b"val2017"]


def test_two_releases_at_once_are_refused(coco2017):
    write_coco(coco2017, 2014, "val", {1: ["x"]})
    with pytest.raises(DataError, match=r"captions of more than one release: .*captions_val2014\.json.*Name the"):
        read_source(coco2017, split="val")


@pytest.mark.parametrize("images", ["photos", "photos/val2017"])
def test_images_elsewhere(tmp_path, images):
    file = write_coco(tmp_path / "a", 2017, "val", {5: ["x"]})
    (tmp_path / "photos").mkdir()
    (tmp_path / "a" / "val2017").rename(tmp_path / "photos" / "val2017")
    with pytest.raises(DataError, match="None of the 1 images"):
        read_source(file)
    assert len(read_source(file, images=tmp_path / images)) == 1


def test_unknown_split_names_those_present(coco2017):
    with pytest.raises(DataError, match=r"No split 'test' in .*captions_val2017\.json\. Present: train, val\."):
        read_source(coco2017, split="test")
    with pytest.raises(DataError, match=r"No split 'train' in .*captions_val2017\.json\. Present: val\."):
        read_source(coco2017 / "annotations" / "captions_val2017.json", split="train")


def test_missing_images_and_captions_are_counted(coco2017):
    file = write_coco(coco2017, 2017, "val", {1: ["x"], 2: [], 3: ["  "], 4: ["y"]})
    (coco2017 / "val2017" / "000000000004.jpg").unlink()
    document = json.loads(file.read_text())
    document["annotations"] += [{"image_id": 99, "caption": "of nothing"}, {"image_id": [1], "caption": "odd"}]
    document["images"] += [{"id": 1, "file_name": "again.jpg"}, {"id": "7", "file_name": "x.jpg"}]
    file.write_text(json.dumps(document))
    source = read_source(file)
    assert [record.key for record in source] == ["000000000001.jpg"]
    assert source.problems.examples == {
        "image id that stands twice": ["captions_val2017.json images[4]"],
        "image entry without id or file_name": ["captions_val2017.json images[5]"],
        "empty caption": ["captions_val2017.json annotations[1]"],
        "caption of an image that is not listed": [
            "captions_val2017.json annotations[3]",
            "captions_val2017.json annotations[4]",
        ],
        "image without caption": ["000000000002.jpg", "000000000003.jpg"],
        "image file missing": ["000000000004.jpg"],
    }


def test_all_images_missing_prints_the_tree(coco2017):
    for image in (coco2017 / "val2017").iterdir():
        image.unlink()
    with pytest.raises(DataError) as error:
        read_source(coco2017, split="val")
    message = str(error.value)
    assert "None of the 2 images named in" in message
    assert "first: 000000397133.jpg" in message
    assert "Searched in:" in message
    assert "--images" in message
    assert "coco/annotations/captions_val2017.json" in message


def test_no_annotations_prints_the_tree(tmp_path):
    with pytest.raises(DataError, match=r"No captions_\*\.json in [\s\S]*coco/val2017/000000397133\.jpg"):
        read_source(tmp_path, format="coco")


def test_instances_file_is_told_apart(tmp_path):
    file = tmp_path / "instances_val2017.json"
    file.write_text(json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}))
    with pytest.raises(DataError, match="hold no captions: is it an instances or keypoints file"):
        read_source(file)


@pytest.mark.parametrize("text", ['{"images": [{"id": 1, "file_', '{"annotations": 3, "images": []}'])
def test_broken_json(tmp_path, text):
    file = tmp_path / "captions_val2017.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"is no valid JSON|has no list of objects 'annotations'"):
        read_source(file, format="coco")
