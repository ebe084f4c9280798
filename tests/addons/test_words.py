"""Nouns out of captions, by hand."""

from pathlib import Path

import pytest

from vlkit.addons.words import caption_nouns, nouns_of, singular


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("A black dog is running in the snow .", ["dog", "snow"]),
        ("Two small boys and their mother at a table with the red boxes", ["boy", "mother", "table", "box"]),
        ("A man smiles at a woman .", ["man", "woman"]),
        ("The photo of a tall building", ["building"]),
        ("A girl on the left", ["girl"]),
        ("running fast", []),
    ],
)
def test_nouns_end_phrases(caption: str, nouns: list[str]) -> None:
    assert nouns_of(caption) == nouns


def test_singular() -> None:
    plural = "dogs boxes puppies benches buses glass women people grass bus octopus sheep"
    expected = "dog box puppy bench bus glass woman person grass bus octopus sheep"
    assert " ".join(singular(word) for word in plural.split()) == expected


def test_rare_words_are_left_out() -> None:
    captions = ["a dog in the snow", "a dog", "the dogs", "a snow"]
    assert caption_nouns(captions, 2) == ["dog", "snow"]
    assert caption_nouns(captions, 3) == ["dog"]


def test_real_captions(vlkit_data: Path) -> None:
    from vlkit.data.sources import read_source

    captions = [
        text for record in read_source(vlkit_data / "coco_small", format="coco").records for text in record.captions
    ]
    found = caption_nouns(captions, 3)
    assert {"man", "woman", "table", "street"} <= set(found[:40]) and len(found) > 80
