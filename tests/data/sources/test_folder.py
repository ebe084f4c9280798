"""Image folders: labels, order, what is skipped, hostile names."""

import os
import pickle
import sys

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image of " + os.fsencode(name))


def keys(source):
    return [record.key for record in source]


def test_flat_folder_has_no_labels_and_sorted_keys(tmp_path):
    put(tmp_path, "b.png", "a.JPG", "c.webp")
    source = read_source(tmp_path)
    assert (source.format, source.class_names) == ("folder", ())
    assert keys(source) == ["a.JPG", "b.png", "c.webp"]
    assert all(record.label is None and record.captions == () and record.split is None for record in source)
    assert source.records[0].image.read() == b"image of a.JPG"


def test_class_folders_are_recursive_and_labelled_by_sorted_name(tmp_path):
    # "a b" sorts before "a-b" as a string but their keys "a b/..", "a-b/.." and "a/.." would not sort like the names.
    put(tmp_path, "a-b/2.jpg", "a/deep/er/1.jpg", "a/0.jpg", "zebra/x.jpeg")
    source = read_source(tmp_path)
    assert source.class_names == ("a", "a-b", "zebra")
    assert [(record.key, record.label) for record in source] == [
        ("a/0.jpg", 0),
        ("a/deep/er/1.jpg", 0),
        ("a-b/2.jpg", 1),
        ("zebra/x.jpeg", 2),
    ]


def test_image_beside_class_folders_has_no_label(tmp_path):
    put(tmp_path, "cat/1.jpg", "loose.jpg")
    assert {record.key: record.label for record in read_source(tmp_path)} == {"cat/1.jpg": 0, "loose.jpg": None}


def test_hidden_and_other_files_are_counted_and_named(tmp_path):
    put(tmp_path, "cat/1.jpg", "cat/._1.jpg", "cat/notes.txt", "Thumbs.db", ".git/x.jpg", "noext")
    (tmp_path / "empty").mkdir()
    source = read_source(tmp_path)
    assert keys(source) == ["cat/1.jpg"]
    assert source.class_names == ("cat",)
    assert source.problems.counts == {
        "hidden file or folder": 2,
        "not an image by its suffix": 3,
        "folder without images": 1,
    }
    assert source.problems.examples["hidden file or folder"] == [".git", "cat/._1.jpg"]
    assert source.problems.examples["folder without images"] == ["empty"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path, "elsewhere/x.jpg")
    root = tmp_path / "root"
    put(root, "cat/1.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    (root / "cat" / "back").symlink_to(root)
    (root / "cat" / "gone.jpg").symlink_to(root / "nothing.jpg")
    source = read_source(root)
    assert keys(source) == ["cat/1.jpg", "cat/2.jpg", "dog/x.jpg"]
    assert source.problems.counts == {"link that leads back to a folder above it": 1, "broken link": 1}


def test_split_folders(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "validation/dog/3.jpg")
    everything = read_source(tmp_path)
    assert everything.class_names == ("cat", "dog")
    assert [(record.split, record.label) for record in everything] == [("train", 0), ("train", 1), ("val", 1)]
    only = read_source(tmp_path, split="dev")
    assert only.class_names == ("cat", "dog")  # labels mean the same in every split
    assert [(record.key, record.label) for record in only] == [("validation/dog/3.jpg", 1)]
    with pytest.raises(DataError, match=r"No split 'test' .* Present: train, val\."):
        read_source(tmp_path, split="test")


def test_split_of_a_folder_without_splits(tmp_path):
    put(tmp_path, "cat/1.jpg", "train/1.jpg")  # here `train` is a class: the vehicle
    assert read_source(tmp_path).class_names == ("cat", "train")
    with pytest.raises(DataError, match=r"names no splits\. Leave --split out"):
        read_source(tmp_path, split="test")


def test_hostile_and_non_ascii_names(tmp_path):
    names = ["<img src=x onerror=alert(1)>.jpg", "\x1b[31mred\x1b[0m.jpg", "日本 猫.jpg", "=cmd|calc.jpg", "a\nb.jpg"]
    put(tmp_path, *names)
    source = read_source(tmp_path)
    assert sorted(keys(source)) == sorted(names)  # keys are data; whoever shows them escapes them
    assert all(record.image.read().startswith(b"image of ") for record in source)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not store such names")
def test_name_that_is_not_utf8_gets_a_printable_key(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb") as file:
        file.write(b"x")
    (record,) = read_source(tmp_path)
    assert record.key == "caf\\xe9.jpg"
    record.key.encode("utf-8")
    assert record.image.read() == b"x"


def test_single_image_file(tmp_path):
    put(tmp_path, "photo.jpg")
    assert keys(read_source(tmp_path / "photo.jpg")) == ["photo.jpg"]


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"photo does not exist.*Did you mean photos\?"):
        read_source(tmp_path / "photo")


def test_folder_without_images_prints_the_tree(tmp_path):
    put(tmp_path, "readme.md")
    with pytest.raises(DataError) as error:
        read_source(tmp_path)
    assert f"No images in {tmp_path} (1 x not an image by its suffix: readme.md)." in str(error.value)
    assert "FOLDER/CLASS/**/*" in str(error.value)


def test_option_without_effect_is_refused(tmp_path):
    put(tmp_path, "a.jpg")
    with pytest.raises(ConfigError, match=r"--caption-column has no effect on a source of format 'folder'"):
        read_source(tmp_path, format="folder", caption_column="text")


def test_unknown_format(tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown source format 'cocoo'\. Did you mean coco"):
        read_source(tmp_path, format="cocoo")


def test_source_pickles(tmp_path):
    put(tmp_path, "cat/1.jpg")
    source = read_source(tmp_path)
    assert pickle.loads(pickle.dumps(source)).records == source.records
