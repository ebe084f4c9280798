"""CoOp's split files."""

import json

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import DataError

SPLITS = {
    "train": [["cat/1.jpg", 1, "tabby cat"], ["dog/1.jpg", 0, "dog"]],
    "val": [["dog/2.jpg", 0, "dog"]],
    "test": [["dog/3.jpg", 0, "dog"], ["cat/2.jpg", 1, "tabby cat"], ["cat/9.jpg", 1, "tabby cat"]],
}


def lay_out(root, splits, images="101_ObjectCategories"):
    for name in ("cat/1", "cat/2", "dog/1", "dog/2", "dog/3"):
        path = root / images / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (root / "split_zhou_Pets.json").write_text(json.dumps(splits))
    return root / "split_zhou_Pets.json"


def test_splits_labels_and_names(tmp_path):
    lay_out(tmp_path, SPLITS)
    source = read_source(tmp_path)
    assert (source.format, source.class_names) == ("coop", ("dog", "tabby cat"))
    assert [(record.key, record.label, record.split) for record in source] == [
        ("cat/1.jpg", 1, "train"),
        ("dog/1.jpg", 0, "train"),
        ("dog/2.jpg", 0, "val"),
        ("dog/3.jpg", 0, "test"),
        ("cat/2.jpg", 1, "test"),
    ]
    assert source.problems.counts == {"image file missing": 1}
    assert len(read_source(tmp_path / "split_zhou_Pets.json", split="test")) == 2


def test_images_elsewhere(tmp_path):
    file = lay_out(tmp_path, SPLITS, images="photos")
    with pytest.raises(DataError, match="None of the 6 images"):
        read_source(file)
    assert len(read_source(file, images=tmp_path / "photos")) == 5


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [["a.jpg", 0]], "test": []}, r"train\[0\]: \['a.jpg', 0\] is no \(path, label, class name\)"),
        ({"train": [["a.jpg", "0", "a"]], "test": []}, r"train\[0\]"),
        ({"train": SPLITS["train"]}, "no object with lists train, val and test"),
        ({"train": [["a.jpg", 0, "a"]], "test": [["b.jpg", 0, "b"]]}, "label 0 is 'b' and 'a'"),
        ({"train": [["a.jpg", 0, "a"]], "test": [["b.jpg", 2, "b"]]}, "no image of label 1"),
    ],
)
def test_other_forms_are_refused(tmp_path, splits, message):
    with pytest.raises(DataError, match=message):
        read_source(lay_out(tmp_path, splits), format="coop")
