"""Fields by weight, sub-captions, templates; the texts of a sample follow from seed, epoch and its number."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vlkit.data.caption_choice import (
    CaptionChoice,
    Draw,
    check_fields,
    split_sentences,
    sub_captions,
    tokens_name,
    weighted_choice,
)
from vlkit.data.shard_index import ShardIndex, ShardSet, write_index
from vlkit.errors import DataError

LONG = "A dog runs. It is brown! Is it fast? Yes.\nA tree stands behind it."


def files_of(*samples: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Of a shard, each sample with an image."""
    for number, files in enumerate(samples):
        for suffix, content in {"jpg": b"x", **files}.items():
            yield f"{number:04}.{suffix}", content


def as_json(**values: object) -> bytes:
    return json.dumps(values).encode()


@pytest.fixture
def shard(tmp_path: Path, write_tar: Callable[..., Path]) -> ShardIndex:
    files = files_of(
        {"txt": b"alt text", "json": as_json(caption="a", synthetic=["b", "c"], long=LONG)},
        {"json": as_json(caption="only", synthetic="  ")},
        {"json": as_json(synthetic=[3, None]), "cls": b"1"},
        {"json": as_json(name="tench_fish"), "cls": b"7"},
    )
    return ShardIndex.open(write_tar(tmp_path / "0.tar", files))


def chosen(choice: CaptionChoice, shard: ShardIndex, i: int, epoch: int) -> list[str]:
    return [text.text for text in choice.texts(shard, i, "bpe", Draw(0, epoch, i))]


def test_fields_come_by_their_weight(shard: ShardIndex) -> None:
    choice = CaptionChoice(fields=(("caption", 0.6), ("synthetic", 0.3), ("txt", 0.1)))
    counts = Counter(text for epoch in range(3000) for text in chosen(choice, shard, 0, epoch))
    assert {name: round(count / 3000, 1) for name, count in counts.items()} == {
        "a": 0.6, "b": 0.1, "c": 0.2, "alt text": 0.1,
    } or abs(counts["b"] - counts["c"]) < 150  # fmt: skip
    assert abs(counts["a"] / 3000 - 0.6) < 0.03 and abs(counts["alt text"] / 3000 - 0.1) < 0.02
    assert abs((counts["b"] + counts["c"]) / 3000 - 0.3) < 0.03
    assert {text for epoch in range(20) for text in chosen(choice, shard, 1, epoch)} == {"only"}
    assert chosen(choice, shard, 2, 0) == []
    assert chosen(choice, shard, 0, 5) == chosen(choice, shard, 0, 5)


def test_several_captions_are_different_ones(shard: ShardIndex) -> None:
    choice = CaptionChoice(per_image=3, fields=(("caption", 5.0), ("synthetic", 1.0)))
    assert all(sorted(chosen(choice, shard, 0, epoch)) == ["a", "b", "c"] for epoch in range(5))
    two = CaptionChoice(per_image=2, fields=(("caption", 5.0), ("synthetic", 1.0)))
    assert all(len(set(chosen(two, shard, 0, epoch))) == 2 for epoch in range(50))


def test_weights_count_among_what_is_left() -> None:
    """Of weights 4, 2, 2 the second place goes to the first item with 1/2 * 4/6 = 1/3 (after either of the others)."""
    pairs = [weighted_choice([4, 2, 2], 2, Draw(1, epoch, 0)) for epoch in range(4000)]
    assert abs(sum(pair[0] == 0 for pair in pairs) / 4000 - 1 / 2) < 0.03
    assert abs(sum(pair[1] == 0 for pair in pairs) / 4000 - 1 / 3) < 0.03


def test_sentences() -> None:
    assert split_sentences(LONG) == ["A dog runs.", "It is brown!", "Is it fast?", "Yes.", "A tree stands behind it."]
    assert split_sentences("3.5 cats, no end") == ["3.5 cats, no end"]
    assert split_sentences(" \n ") == []


def test_sub_captions_are_one_to_three_sentences_drawn_alike() -> None:
    sentences = list("abcdefgh")
    parts = [sub_captions(sentences, 1, 3, np.random.default_rng(seed))[0].split(" ") for seed in range(6000)]
    lengths = Counter(map(len, parts))
    assert all(abs(lengths[n] / 6000 - 1 / 3) < 0.03 for n in (1, 2, 3))
    neighbours = [ord(part[1]) - ord(part[0]) == 1 for part in parts if len(part) == 2]
    # Half of the pairs on purpose, and of the others the 7 neighbours among 28 pairs.
    assert abs(np.mean(neighbours) - (0.5 + 0.5 * 7 / 28)) < 0.04
    assert all(part == sorted(part) for part in parts)
    singles = Counter(part[0] for part in parts if len(part) == 1)
    assert len(singles) == 8 and max(singles.values()) < 1.4 * min(singles.values())
    four = sub_captions(sentences, 4, 1, np.random.default_rng(0))
    assert len(set(four)) == len(four) <= 4
    assert sub_captions([], 4, 3, np.random.default_rng(0)) == []


def test_sub_captions_of_a_sample_change_with_the_epoch(shard: ShardIndex) -> None:
    choice = CaptionChoice(fields=(("long", 1.0),), sub_captions=3, most_sentences=2)
    epochs = [tuple(chosen(choice, shard, 0, epoch)) for epoch in range(10)]
    assert len(set(epochs)) > 5 and epochs[3] == tuple(chosen(choice, shard, 0, 3))
    whole = set(split_sentences(LONG))
    assert all(set(split_sentences(text)) <= whole for texts in epochs for text in texts)


def test_templates_name_the_class(shard: ShardIndex) -> None:
    choice = CaptionChoice(templates=("a {}.", "the {}!"), class_names=("cat", "dog {x}"))
    assert {text for epoch in range(20) for text in chosen(choice, shard, 2, epoch)} == {"a dog {x}.", "the dog {x}!"}
    both = CaptionChoice(per_image=2, templates=("a {}.", "the {}!"), class_field="name")
    assert sorted(chosen(both, shard, 3, 0)) == ["a tench fish.", "the tench fish!"]
    for row, message in ((3, "the label is 7, but there are 2 class names"), (0, "no .cls file")):
        with pytest.raises(DataError, match=message):
            chosen(choice, shard, row, 0)
    with pytest.raises(DataError, match="no text under 'name'"):
        chosen(both, shard, 0, 0)


def test_token_ids_of_a_field_are_used(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    path = write_tar(tmp_path / "0.tar", files_of({"json": as_json(caption="a", synthetic=["b", "c"])}))
    write_index(path, {"bpe": [[[9]]], tokens_name("bpe", "synthetic"): [[[1, 2], [3]]]})
    shard = ShardIndex.open(path)
    found = CaptionChoice(per_image=3, fields=(("caption", 1.0), ("synthetic", 1.0))).texts(
        shard, 0, "bpe", Draw(0, 0, 0)
    )
    assert {text.text: text.tokens for text in found} == {"a": None, "b": [1, 2], "c": [3]}
    assert CaptionChoice().texts(shard, 0, "bpe", Draw(0, 0, 0))[0].tokens == [9]


def test_a_field_that_is_nowhere_is_refused(tmp_path: Path, shard: ShardIndex) -> None:
    shards = ShardSet((shard,))
    check_fields(shards, CaptionChoice(fields=(("caption", 1.0), ("txt", 1.0))))
    with pytest.raises(DataError, match=r"None of the first 4 samples has a caption field 'sinthetic'.*synthetic"):
        check_fields(shards, CaptionChoice(fields=(("sinthetic", 1.0),)))
    with pytest.raises(DataError, match=r"'nam'.*Did you mean name"):
        check_fields(shards, CaptionChoice(templates=("{}",), class_field="nam"))
