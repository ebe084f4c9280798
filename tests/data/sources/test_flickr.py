"""Flickr8k and Flickr30k in miniatures of their official and Kaggle trees."""

import json

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import DataError


def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())


def token_lines(*names, captions=5):
    return "".join(f"{name}#{i}\tCaption {i} of {name} .\n" for name in names for i in range(captions))


@pytest.fixture(params=["Flicker8k_Dataset", "Flickr8k_Dataset", "Images"])
def flickr8k(tmp_path, request):
    put(tmp_path / request.param, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (tmp_path / "Flickr8k.token.txt").write_text(token_lines("a.jpg", "b.jpg", "ghost.jpg.1", "c.jpg", "d.jpg"))
    for split, names in {"train": ["d.jpg", "a.jpg"], "dev": ["b.jpg"], "test": ["c.jpg"]}.items():
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))
    return tmp_path


def test_flickr8k_original_tree(flickr8k):
    source = read_source(flickr8k)
    assert source.format == "flickr8k"
    assert [(record.key, record.split) for record in source] == [
        ("a.jpg", "train"),
        ("b.jpg", "val"),
        ("c.jpg", "test"),
        ("d.jpg", "train"),
    ]
    assert source.records[0].captions == tuple(f"Caption {i} of a.jpg ." for i in range(5))
    assert source.problems.examples == {"image file missing": ["ghost.jpg.1"]}


@pytest.mark.parametrize(("split", "keys"), [("train", ["a.jpg", "d.jpg"]), ("dev", ["b.jpg"]), ("val", ["b.jpg"])])
def test_flickr8k_splits(flickr8k, split, keys):
    assert [record.key for record in read_source(flickr8k, split=split)] == keys
    assert [record.key for record in read_source(flickr8k / "Flickr8k.token.txt", split=split)] == keys


def test_flickr8k_texts_in_a_folder_of_their_own(flickr8k):
    (flickr8k / "Flickr8k_text").mkdir()
    for file in flickr8k.glob("*.txt"):
        file.rename(flickr8k / "Flickr8k_text" / file.name)
    assert [record.key for record in read_source(flickr8k, split="test")] == ["c.jpg"]
    assert [record.key for record in read_source(flickr8k / "Flickr8k_text", split="test")] == ["c.jpg"]


def test_flickr8k_without_split_lists(flickr8k):
    for file in flickr8k.glob("Flickr_8k.*"):
        file.unlink()
    assert len(read_source(flickr8k)) == 4
    with pytest.raises(DataError, match="names no splits"):
        read_source(flickr8k, split="test")


def test_flickr8k_image_in_two_lists(flickr8k):
    (flickr8k / "Flickr_8k.testImages.txt").write_text("c.jpg\na.jpg\n")
    with pytest.raises(DataError, match=r"Flickr_8k\.testImages\.txt, line 2: a\.jpg is already in split 'train'"):
        read_source(flickr8k, split="test")


def test_flickr8k_kaggle(tmp_path):
    put(tmp_path / "Images", "a.jpg")
    text = 'image,caption\na.jpg,A dog .\na.jpg,"A dog , running ."\na.jpg\nb.jpg,\n'
    (tmp_path / "captions.txt").write_text(text)
    source = read_source(tmp_path)
    assert (source.format, [record.captions for record in source]) == ("flickr8k", [("A dog .", "A dog , running .")])
    assert source.problems.examples == {
        "row that has not the 2 cells of the header": ["captions.txt:4"],
        "empty caption": ["captions.txt:5"],
    }


def test_bad_token_lines_are_counted(flickr8k):
    with open(flickr8k / "Flickr8k.token.txt", "a") as file:
        file.write("no tab here\n\nb.jpg\tno number\n#3\tno name\nb.jpg#5\t\n")
    assert read_source(flickr8k, split="val").problems.examples == {
        "line that is not 'name.jpg#0<TAB>caption'": ["Flickr8k.token.txt:26", "Flickr8k.token.txt:28"],
        "row without an image name": ["Flickr8k.token.txt:29"],
        "empty caption": ["Flickr8k.token.txt:30"],
    }


def test_flickr8k_missing_parts_print_the_tree(tmp_path):
    with pytest.raises(DataError, match=r"No Flickr8k\.token\.txt or captions\.txt in [\s\S]*Flicker8k_Dataset/"):
        read_source(tmp_path, format="flickr8k")
    (tmp_path / "Flickr8k.token.txt").write_text(token_lines("a.jpg"))
    with pytest.raises(DataError, match=r"None of the 1 images[\s\S]*Expected for --format flickr8k"):
        read_source(tmp_path)


def flickr30k(root, images="flickr30k-images", captions="results_20130124.token"):
    names = ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    put(root / images, *names)
    if captions.endswith(".csv"):
        rows = "".join(f"{name}| {i}| Caption {i} | of {name} .\n" for name in names for i in range(5))
        (root / captions).write_text("image_name| comment_number| comment\n" + rows)
    else:
        (root / captions).write_text(token_lines(*names))
    return root


def write_karpathy(root, splits):
    images = [{"filename": name, "split": split, "sentences": [{"raw": "x"}]} for name, split in splits.items()]
    (root / "dataset_flickr30k.json").write_text(json.dumps({"dataset": "flickr30k", "images": images}))


@pytest.mark.parametrize("images", ["flickr30k-images", "flickr30k_images"])
def test_flickr30k_token_file_with_karpathy_split(tmp_path, images):
    write_karpathy(flickr30k(tmp_path, images), {"2.jpg": "test", "3.jpg": "val", "1.jpg": "train"})
    source = read_source(tmp_path, split="test")
    assert (source.format, [record.key for record in source]) == ("flickr30k", ["2.jpg"])
    assert len(source.records[0].captions) == 5  # of the token file, not the one of the split file
    assert [record.split for record in read_source(tmp_path)] == ["train", "test", "val", None]


def test_flickr30k_listed_split(tmp_path):
    flickr30k(tmp_path)
    for split, text in {"train": "1\n3\n", "val": "4\n", "test": "2\n"}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    assert [record.key for record in read_source(tmp_path, split="train")] == ["1.jpg", "3.jpg"]
    assert [record.key for record in read_source(tmp_path, split="dev")] == ["4.jpg"]


def test_flickr30k_two_definitions_of_the_split_are_refused(tmp_path):
    write_karpathy(flickr30k(tmp_path), {"1.jpg": "test"})
    (tmp_path / "test.txt").write_text("2\n")
    with pytest.raises(DataError, match=r"defines the split twice: dataset_flickr30k\.json"):
        read_source(tmp_path, split="test")


def test_flickr30k_kaggle_csv_with_its_one_broken_row(tmp_path):
    flickr30k(tmp_path, "flickr30k_images", "results.csv")
    put(tmp_path / "flickr30k_images", "2199200615.jpg")
    with open(tmp_path / "results.csv", "a") as file:
        file.write(
            "2199200615.jpg| 3| A dog is running .\n2199200615.jpg| 4   A dog runs across the grass .\nnonsense\n"
        )
    source = read_source(tmp_path)
    assert source.format == "flickr30k"
    assert source.records[0].captions[0] == "Caption 0 | of 1.jpg ."
    assert source.records[-1].captions == ("A dog is running .", "A dog runs across the grass .")
    assert source.problems.examples == {"line that is not 'name.jpg| number| caption'": ["results.csv:24"]}


def test_flickr30k_missing_parts_print_the_tree(tmp_path):
    with pytest.raises(DataError, match=r"No results_20130124\.token or results\.csv in [\s\S]*flickr30k-images/"):
        read_source(tmp_path, format="flickr30k")
