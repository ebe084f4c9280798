"""CaSED against a loop from the paper, the assignment against SciPy, and the command on real photographs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from eval.metrics.matching import best_assignment, cluster_accuracy
from eval.vocabulary_free import CaSED, VocabularyFreeEvaluator
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError

TEXTS = [
    "a dog in the snow", "a dog on a sofa", "two dogs and a ball", "the red ball", "a cat on a sofa", "a sofa",
    "a boat on the lake", "the lake", "a boat and a dog", "running fast", "very nice", "oh well",
]  # fmt: skip
NOUNS = {
    0: {"dog", "snow"}, 1: {"dog", "sofa"}, 2: {"dog", "ball"}, 3: {"ball"}, 4: {"cat", "sofa"}, 5: {"sofa"},
    6: {"boat", "lake"}, 7: {"lake"}, 8: {"boat", "dog"},
}  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (7, 2), (1, 1)])
def test_assignment_against_scipy(shape: tuple[int, int]) -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, 9, shape).astype(np.float64)
        rows, columns = linear_sum_assignment(values, maximize=True)
        pairs = best_assignment(values)
        assert len(pairs) == min(shape) == len({row for row, _ in pairs}) == len({column for _, column in pairs})
        assert sum(values[pair] for pair in pairs) == values[rows, columns].sum()


def test_cluster_accuracy_by_hand() -> None:
    labels, clusters = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([7, 7, 3, 3, 3, 3])
    # 7 is class 0 (2 items), 3 is class 1 (2 items); class 2 gets no cluster.
    assert cluster_accuracy(labels, clusters) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match=r"expected \(N,\) both"):
        cluster_accuracy(labels, clusters[:3])


def test_names_against_a_loop(named_vectors: Callable[..., Any]) -> None:
    source = named_vectors(dim=8)
    captions = source.embed_texts(TEXTS)
    images = F.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    method = CaSED(TEXTS, captions, num_captions=3, alpha=0.6, template="a {}")
    named = method.name_images(images, source)
    without = 0
    for image, found in zip(images, named, strict=True):
        near = sorted(range(len(TEXTS)), key=lambda row: -float(captions[row] @ image))[:3]
        words = [word for row in near for word in NOUNS.get(row, set())]
        candidates = sorted({word for word in words if words.count(word) >= 2})
        assert found.candidates == tuple(candidates)
        if not candidates:
            without += 1
            assert found.name == "object"
            continue
        vectors = torch.stack([source.vector(f"a {word}") for word in candidates])
        centroid = F.normalize(captions[near].mean(0), dim=0)
        one, two = (20 * vectors @ image).softmax(0), (20 * vectors @ centroid).softmax(0)
        score = 0.6 * one + 0.4 * two
        assert found.name == candidates[int(score.argmax())] and found.score == pytest.approx(score.max().item())
    assert 0 < without < 9


def test_the_captions_centroid_counts(named_vectors: Callable[..., Any]) -> None:
    # The image alone is undecided with a slight lean to the ball; its captions speak of dogs.
    vectors = {
        "a dog": [1.0, 0.0, 0.0], "a ball": [0.0, 1.0, 0.0],
        **{text: [1.0, 0.2, 0.5] for text in ("a dog and a ball", "the ball and the dog")},
    }  # fmt: skip
    source = named_vectors(vectors)
    texts = ["a dog and a ball", "the ball and the dog"]
    image = F.normalize(torch.tensor([[0.68, 0.70, 0.2]]), dim=-1)
    for alpha, name in ((1.0, "ball"), (0.5, "dog")):
        method = CaSED(texts, source.embed_texts(texts), num_captions=2, alpha=alpha, template="a {}")
        assert method.name_images(image, source)[0].name == name


def test_evaluator(named_vectors: Callable[..., Any]) -> None:
    vectors = {"x/1": [1.0, 0.1], "x/2": [1.0, 0.0], "y/1": [0.0, 1.0], "dog": [1.0, 0.0], "boat": [0.0, 1.0]}
    vectors |= {text: [1.0, 0.0] for text in ("a dog in the snow", "a dog on a sofa")}
    vectors |= {text: [0.0, 1.0] for text in ("a boat on the lake", "a boat and a dog")}
    records = [Record(key, ImageRef(data=b""), label=int(key[0] == "y")) for key in ("x/1", "x/2", "y/1")]
    texts = [text for text in vectors if text.startswith("a ")]
    evaluation = VocabularyFreeEvaluator(records, ("big dog", "boat"), texts, 2, template="{}").run(
        named_vectors({**vectors, "big dog": [1.0, 1.0]})
    )
    assert evaluation.metrics["cluster_accuracy"] == 1 and evaluation.metrics["exact_match"] == pytest.approx(1 / 3)
    assert evaluation.metrics["semantic_iou"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert evaluation.metrics["semantic_similarity"] == pytest.approx((2 * 0.5**0.5 + 1) / 3, abs=1e-6)
    bare = [Record(record.key, record.image) for record in records]
    unlabelled = VocabularyFreeEvaluator(bare, (), texts, 2, template="{}").run(named_vectors(vectors))
    assert unlabelled.metrics == {"named": 1.0} and unlabelled.per_item is not None
    assert unlabelled.per_item["name"].to_pylist() == ["dog", "dog", "boat"]
    with pytest.raises(DataError, match="no caption"):
        VocabularyFreeEvaluator(records, ("a", "b"), [])
    with pytest.raises(DataError, match="10 captions are to be found among 4"):
        VocabularyFreeEvaluator(records, ("a", "b"), texts).run(named_vectors(vectors))
    with pytest.raises(ConfigError, match="alpha within 0 and 1"):
        CaSED(texts, torch.ones(4, 2), 2, alpha=2.0)


def test_command(vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]) -> None:
    folder = tmp_path / "photos"
    for name in ("dog", "car"):
        (folder / name).mkdir(parents=True)
    scenes = sorted((vlkit_data / "coco_small" / "val2017").glob("*.jpg"))[:4]
    for number, path in enumerate(scenes):
        (folder / ("dog", "car")[number % 2] / path.name).symlink_to(path)
    called = call_vlkit(
        "eval", "vocabulary-free", "--model", f"local-dir:{general_encoder}", "--data", folder, "--captions",
        vlkit_data / "coco_small", "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["counts"]["images"] == 4 and line["metrics"]["cluster_accuracy"] >= 0.5
