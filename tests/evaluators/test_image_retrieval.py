"""Image-to-image retrieval against loops over sorted galleries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.image_retrieval import ImageRetrievalEvaluator, RelevanceList, read_relevance
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError, GalleryError


def records(num: int, num_classes: int, name: str = "g") -> list[Record]:
    return [Record(f"{name}{row}", ImageRef(data=b""), label=row % num_classes) for row in range(num)]


def ordered(source: Any, query: Record, gallery: list[Record]) -> list[Record]:
    similarity = torch.stack([source.vector(record.key) for record in gallery]) @ source.vector(query.key)
    return [gallery[row] for row in similarity.argsort(descending=True).tolist()]


def test_by_label_each_image_asks_for_the_others(named_vectors: Callable[..., Any]) -> None:
    gallery = [*records(24, 4), Record("alone", ImageRef(data=b""), label=9)]
    source = named_vectors(dim=5)
    evaluation = ImageRetrievalEvaluator(gallery).run(source)
    precision, first, ten = [], [], []
    for query in gallery[:-1]:
        order = ordered(source, query, [record for record in gallery if record is not query])
        hits = [record.label == query.label for record in order]
        precision.append(np.mean([np.mean(hits[: i + 1]) for i in np.flatnonzero(hits)]))
        first.append(any(hits[:5]))
        ten.append(sum(hits[:10]) / 5)
    assert evaluation.metrics["mean_average_precision"] == pytest.approx(np.mean(precision))
    assert evaluation.metrics["cmc@5"] == pytest.approx(np.mean(first))
    assert evaluation.metrics["mar@10"] == pytest.approx(np.mean(ten)) == evaluation.metrics["recall@10"]
    # The image without another of its class is counted and left out of every mean.
    assert evaluation.counts["queries_without_right_answer"] == 1 and evaluation.counts["queries"] == 25


def test_lists_with_ignored_images_and_a_gallery_of_its_own(named_vectors: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    file.write_text(
        '{"query": "q0", "relevant": ["g1", "g5"], "ignored": ["g2"]}\n\n{"query": "q2", "relevant": ["g3"]}\n'
    )
    lists = read_relevance(file)
    assert lists["q0"] == RelevanceList(("g1", "g5"), ("g2",))
    gallery, queries, source = records(12, 3), records(3, 3, "q"), named_vectors(dim=5)
    evaluation = ImageRetrievalEvaluator(gallery, queries, lists).run(source)
    expected = []
    for name, right in (("q0", {"g1", "g5"}), ("q2", {"g3"})):
        order = ordered(source, next(q for q in queries if q.key == name), gallery)
        hits = [record.key in right for record in order if record.key not in lists[name].ignored]
        expected.append(np.mean([np.mean(hits[: i + 1]) for i in np.flatnonzero(hits)]))
    assert evaluation.metrics["mean_average_precision"] == pytest.approx(np.mean(expected))
    assert evaluation.counts["queries"] == 2 and evaluation.counts["images"] == 12


def test_bad_input_is_refused(named_vectors: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="K is 10, but a gallery has 7 images"):
        ImageRetrievalEvaluator(records(8, 2)).run(named_vectors(dim=4))
    with pytest.raises(DataError, match=r"1 images have no class \(first: bare\)"):
        ImageRetrievalEvaluator([*records(3, 1), Record("bare", ImageRef(data=b""))])
    with pytest.raises(DataError, match=r"name 1 images that are not there \(first: 'g99'\)"):
        ImageRetrievalEvaluator(records(3, 1), lists={"g0": RelevanceList(("g99",))})
    with pytest.raises(DataError, match="No query has a right answer"):
        ImageRetrievalEvaluator(records(12, 12)).run(named_vectors(dim=4))
    with pytest.raises(GalleryError, match="not finite for 1 of 12 images"):
        ImageRetrievalEvaluator(records(12, 2)).run(named_vectors({"g3": [torch.inf, 0.0]}))
    (tmp_path / "lists.jsonl").write_text('{"query": "a", "relevant": "b"}\n')
    with pytest.raises(DataError, match=r"lists\.jsonl, line 1"):
        read_relevance(tmp_path / "lists.jsonl")
