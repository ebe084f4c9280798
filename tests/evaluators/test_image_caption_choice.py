"""Winoground's three scores by hand, chance for equal scores, and the official file forms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.choice_sets import read_sugarcrepe, read_winoground, swap_nouns, swap_two
from eval.image_caption_choice import ChoiceInstance, ImageCaptionChoiceEvaluator, choice_hits
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError, GalleryError


def test_winogrounds_scores_by_hand() -> None:
    # Rows are images, columns captions; the definitions of the paper, case by case.
    assert choice_hits(torch.tensor([[0.9, 0.1], [0.2, 0.8]])) == (1, 1, 1)
    # Each image prefers its caption, but caption 1 prefers image 0.
    assert choice_hits(torch.tensor([[0.9, 0.7], [0.2, 0.6]])) == (1, 0, 0)
    # Each caption prefers its image, but image 1 prefers caption 0.
    assert choice_hits(torch.tensor([[0.9, 0.1], [0.7, 0.6]])) == (0, 1, 0)
    # One image, SugarCrepe.
    assert choice_hits(torch.tensor([[0.6, 0.7]])).text == 0


def test_equal_scores_are_chance() -> None:
    assert choice_hits(torch.full((2, 2), 0.3)) == pytest.approx((1 / 4, 1 / 4, 1 / 6))
    assert choice_hits(torch.full((1, 2), 0.3)) == pytest.approx((1 / 2, 1, 1 / 2))
    # Captions alike, images not: which caption an image takes is open, which image a caption takes is not.
    assert choice_hits(torch.tensor([[0.9, 0.9], [0.1, 0.1]])) == pytest.approx((1 / 4, 0, 0))


def test_evaluator_counts_instances_and_tags(named_vectors: Callable[..., Any]) -> None:
    images = [Record(name, ImageRef(data=data)) for name, data in (("a", b""), ("b", b""), ("c", b"broken"))]
    instances = [
        ChoiceInstance("1", (images[0], images[1]), ("is a", "is b"), "swap"),
        ChoiceInstance("2", (images[1], images[0]), ("is a", "is b"), "word"),
        ChoiceInstance("3", (images[2], images[0]), ("is a", "is b"), "word"),
    ]
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "is a": [0.9, 0.1], "is b": [0.1, 0.9]}
    evaluation = ImageCaptionChoiceEvaluator(instances).run(named_vectors(vectors))
    assert evaluation.metrics["group_accuracy"] == 0.5 == evaluation.metrics["text_accuracy"]
    assert evaluation.metrics["swap/image_accuracy"] == 1.0 and evaluation.metrics["word/text_accuracy"] == 0.0
    assert evaluation.counts["instances_of_unreadable_images"] == 1 and evaluation.counts["texts"] == 2
    alone = [ChoiceInstance("1", (images[0],), ("is a", "is b"))]
    assert set(ImageCaptionChoiceEvaluator(alone).run(named_vectors(vectors)).metrics) == {"text_accuracy"}
    with pytest.raises(DataError, match="'x' has 1 images and 1 captions"):
        ImageCaptionChoiceEvaluator([ChoiceInstance("x", (images[0],), ("only",))])
    with pytest.raises(GalleryError, match="not finite"):
        ImageCaptionChoiceEvaluator(alone).run(named_vectors({**vectors, "is b": [torch.nan, 0.0]}))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for folder in ("images", "val2017"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(
                tmp_path / folder / (f"ex_{number}.png" if folder == "images" else f"{number}.jpg")
            )
    return tmp_path


def test_winogrounds_file(pictures: Path) -> None:
    row = {
        "id": 7, "image_0": "ex_0", "image_1": "ex_1", "caption_0": "a dog on a cat", "caption_1": "a cat on a dog",
        "collapsed_tag": "Object",
    }  # fmt: skip
    lost = {**row, "id": 8, "image_1": "ex_9"}
    (pictures / "examples.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(lost) + "\n")
    found = read_winoground(pictures / "examples.jsonl")
    (one,) = found.instances
    assert (one.key, one.captions, one.tag) == ("7", ("a dog on a cat", "a cat on a dog"), "Object")
    assert [image.key for image in one.images] == ["ex_0", "ex_1"] and dict(found.left_out)[
        "instances_without_image"
    ] == 1
    (pictures / "examples.jsonl").write_text('{"id": 1, "image_0": "ex_0"}\n')
    with pytest.raises(DataError, match=r"examples\.jsonl, line 1: no text under 'image_1'"):
        read_winoground(pictures / "examples.jsonl")


def test_sugarcrepes_files(pictures: Path) -> None:
    for name in ("add_obj", "swap_att"):
        rows = {"0": {"filename": "0.jpg", "caption": "a red car", "negative_caption": f"a {name} car"}}
        (pictures / f"{name}.json").write_text(json.dumps(rows))
    found = read_sugarcrepe(pictures)
    assert [(one.key, one.tag, len(one.images)) for one in found.instances] == [
        ("add_obj/0", "add_obj", 1),
        ("swap_att/0", "swap_att", 1),
    ]
    assert found.instances[0].captions == ("a red car", "a add_obj car")
    with pytest.raises(DataError, match="None of the images named in"):
        read_sugarcrepe(pictures / "add_obj.json", images=pictures / "images")


def test_nouns_are_exchanged_and_nothing_else() -> None:
    assert swap_two("A dog chases a Cat near a dog .", {"dog", "cat"}) == "A Cat chases a dog near a dog ."
    assert swap_two("A dog and a dog .", {"dog", "cat"}) is None
    captions = (
        "A dog is on a sofa .",
        "The dog and the red ball .",
        "A sofa .",
        "A bird in a red tree .",
        "The bird .",
    )
    found = swap_nouns([Record("a", ImageRef(data=b""), captions)])
    # "ball" follows no article and "tree" stands once: no nouns here; "red" ends no phrase.
    assert [one.captions for one in found.instances] == [("A dog is on a sofa .", "A sofa is on a dog .")]
    assert dict(found.left_out)["captions_without_two_nouns"] == 4
    with pytest.raises(DataError, match="two nouns to exchange"):
        swap_nouns([Record("a", ImageRef(data=b""), ("Red .",))])


def test_substitute_from_real_captions(vlkit_data: Path) -> None:
    from vlkit.data.sources import read_source

    records = read_source(vlkit_data / "coco_small", format="coco").records
    found = swap_nouns(records)
    assert len(found.instances) > 300
    for one in found.instances:
        right, wrong = (sorted(caption.lower().split()) for caption in one.captions)
        assert right != wrong or one.captions[0].lower() != one.captions[1].lower()
        assert sorted("".join(right)) == sorted("".join(wrong))
