"""The retrieval evaluator with an encoder made by hand, whose answers are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval.retrieval import RetrievalEvaluator, measure_retrieval
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError, GalleryError

BROKEN = b"broken"


class Read(NamedTuple):
    embeddings: Tensor
    kept: list[int]
    failures: list[tuple[int, str]]


@dataclass
class HandMade:
    """Looks its vectors up: images by key, texts by their words."""

    images: dict[str, list[float]]
    texts: dict[str, list[float]]
    asked: list[str] = field(default_factory=list)

    def embed_images_where_readable(self, images: Sequence[Record], *, progress: Any = None, **_: object) -> Read:
        kept = [row for row, record in enumerate(images) if record.image.data != BROKEN]
        failures = [(row, "no image") for row, record in enumerate(images) if record.image.data == BROKEN]
        if progress:
            progress(len(images), len(images))
        return Read(torch.tensor([self.images[images[row].key] for row in kept]), kept, failures)

    def embed_texts(self, texts: Sequence[str], *, progress: Any = None) -> Tensor:
        self.asked = list(texts)
        if progress:
            progress(1, 1)
        return torch.tensor([self.texts[text] for text in texts])


def record(key: str, *captions: str, data: bytes = b"fine") -> Record:
    return Record(key, ImageRef(data=data), captions)


@pytest.fixture
def encoder() -> HandMade:
    return HandMade(
        images={"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "c": [0.0, 0.0, 1.0]},
        texts={
            "is a": [1.0, 0.0, 0.0],
            "more a than b": [0.8, 0.6, 0.0],
            "is b": [0.0, 1.0, 0.0],
            "says c, means b": [0.0, 0.8, 0.6],
            "hardly c": [0.6, 0.0, 0.8],
        },
    )


def test_recall_and_counts_by_hand(encoder: HandMade) -> None:
    records = [
        record("a", "is a"),
        record("without captions"),
        record("broken", "is a", "is b", data=BROKEN),
        record("b", "is b", "more a than b"),
        record("c", "says c, means b"),
    ]
    calls: list[tuple[int, int]] = []
    evaluation = RetrievalEvaluator(records, ks=(1, 2, 10), progress=lambda *call: calls.append(call)).run(encoder)
    # Captions: "is a" finds a; "is b" finds b; "more a than b" belongs to b, ranks it second; "says c, means b"
    # belongs to c, ranks it second. Images: a finds its own caption (1.0 before 0.8); b finds its own; c finds its
    # only caption, as the others score 0.
    assert evaluation.metrics["text_to_image/recall@1"] == pytest.approx(2 / 4)
    assert evaluation.metrics["text_to_image/recall@2"] == 1.0
    assert evaluation.metrics["image_to_text/recall@1"] == 1.0
    assert evaluation.metrics["mean_recall@1"] == pytest.approx(0.75)
    assert evaluation.metrics["text_to_image/median_rank"] == pytest.approx(1.5)
    assert evaluation.counts == {
        "images": 3,
        "texts": 4,
        "unreadable_images": 1,
        "texts_of_unreadable_images": 2,
        "images_without_captions": 1,
        "texts_that_several_images_share": 0,
    }
    assert encoder.asked == ["is a", "is b", "more a than b", "says c, means b"]
    assert evaluation.figures["unreadable_images"] == (("broken", "no image"),)
    low, high = evaluation.intervals["text_to_image/recall@1"]
    assert 0 <= low <= 0.5 <= high <= 1
    assert calls[-1] == (10, 10) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_one_row_for_every_query(encoder: HandMade) -> None:
    table = RetrievalEvaluator([record("a", "is a"), record("b", "is b", "more a than b")]).run(encoder).per_item
    assert table is not None
    rows = table.to_pylist()
    assert [(row["direction"], row["key"], row["caption"]) for row in rows] == [
        ("image_to_text", "a", None),
        ("image_to_text", "b", None),
        ("text_to_image", "a", "is a"),
        ("text_to_image", "b", "is b"),
        ("text_to_image", "b", "more a than b"),
    ]
    assert [row["rank"] for row in rows] == [1, 1, 1, 1, 2]
    assert [row["hit@1"] for row in rows] == [1, 1, 1, 1, 0]


def test_words_shared_by_two_images_are_counted_and_tie(encoder: HandMade) -> None:
    records = [record("a", "is a", "is a"), record("b", "is b", "is a"), record("c", "hardly c")]
    evaluation = RetrievalEvaluator(records, ks=(1,)).run(encoder)
    assert evaluation.counts["texts_that_several_images_share"] == 3
    # Image a: two own captions and one of b tie at the top.
    assert evaluation.metrics["image_to_text/recall@1"] == pytest.approx((2 / 3 + 1 + 1) / 3)


def test_examples_hold_right_and_wrong_queries(encoder: HandMade) -> None:
    records = [record("a", "is a"), record("b", "is b", "more a than b"), record("c", "hardly c")]
    examples = RetrievalEvaluator(records, num_examples=2).run(encoder).figures["examples"]
    by_text = [example for example in examples if example.direction == "text_to_image"]
    assert [(example.caption, example.rank) for example in by_text] == [("is a", 1), ("more a than b", 2)]
    assert [(found.record.key, found.right) for found in by_text[1].found[:2]] == [("a", False), ("b", True)]
    by_image = [example for example in examples if example.direction == "image_to_text"]
    assert all(example.found[0].right for example in by_image) and len(by_image) == 2


def test_the_interval_draws_images_not_captions() -> None:
    """Five equal captions of an image are one observation: the interval is as wide as with one of them."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(60, 8, generator=generator), dim=1)
    text = normalize(image + 0.7 * torch.randn(60, 8, generator=generator), dim=1)
    once = measure_retrieval(image, text, torch.arange(60), (1,))
    five = measure_retrieval(image, text.repeat_interleave(5, 0), torch.arange(60).repeat_interleave(5), (1,))
    assert once.intervals["text_to_image/recall@1"] == pytest.approx(five.intervals["text_to_image/recall@1"])


def test_nothing_to_measure_is_refused(encoder: HandMade) -> None:
    with pytest.raises(DataError, match="None of the 1 images has a caption"):
        RetrievalEvaluator([record("a")])
    with pytest.raises(DataError, match=r"None of the 1 images could be read. First: a: no image"):
        RetrievalEvaluator([record("a", "is a", data=BROKEN)]).run(encoder)


def test_features_that_are_not_finite_are_refused(encoder: HandMade) -> None:
    encoder.texts["is b"] = [float("nan"), 0.0, 0.0]
    with pytest.raises(GalleryError, match=r"1 of 2 texts \(first: 'is b'"):
        RetrievalEvaluator([record("a", "is a"), record("b", "is b")]).run(encoder)


def test_true_recall_counts_every_caption(named_vectors: Callable[..., Any]) -> None:
    """Against CLIP_benchmark's own steps, image by image, with one to four captions each."""
    records = [
        Record(f"i{n}", ImageRef(data=b""), tuple(f"caption {n} {copy}" for copy in range(1 + n % 4))) for n in range(9)
    ]
    source = named_vectors(dim=5)
    evaluation = RetrievalEvaluator(records, ks=(1, 5), true_recall=True).run(source)
    captions = [(row, text) for row, record in enumerate(records) for text in record.captions]
    for k in (1, 5):
        recalls = []
        for row, record in enumerate(records):
            scores = [float(source.vector(record.key) @ source.vector(text)) for _, text in captions]
            first = sorted(range(len(captions)), key=lambda place: -scores[place])[:k]
            recalls.append(sum(captions[place][0] == row for place in first) / len(record.captions))
        assert evaluation.metrics[f"image_to_text/true_recall@{k}"] == pytest.approx(sum(recalls) / len(recalls))
    low, high = evaluation.intervals["image_to_text/true_recall@5"]
    assert low <= evaluation.metrics["image_to_text/true_recall@5"] <= high
    plain = RetrievalEvaluator(records, ks=(1, 5)).run(source)
    assert not any("true" in key for key in plain.metrics)
    assert {key: evaluation.metrics[key] for key in plain.metrics} == plain.metrics
