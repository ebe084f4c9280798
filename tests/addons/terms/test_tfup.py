from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlkit.addons.exchange import Vectors
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.terms.tfup import Tfup
from vlkit.addons.unlabelled_cache import representatives, shots_of, two_level_similarity
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]


def apart(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)))


def test_against_the_equations_in_a_slow_loop(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(stream=12, noise=0.5, beside=0.5)
    fitted = Tfup(alpha=0.6, beta=2.0, shots=3).fit(given, tiny_source())
    assert given.stream is not None and given.weights is not None and given.logits is not None
    images, texts = given.stream.vectors.pooled, given.weights.vectors
    p = [torch.softmax(10 * image @ texts.T, 0) for image in images]
    kept: list[tuple[int, int]] = []
    for label in range(3):
        surest = sorted(range(36), key=lambda i: -float(p[i][label]))[:6]
        by_others = sorted(surest, key=lambda i: sum(apart(p[i], p[j]) for j in surest))
        kept += [(i, label) for i in by_others[:3]]
    slow = torch.zeros(36, 3)
    for i in range(36):
        divergences = torch.tensor([apart(p[i], p[j]) for j, _ in kept])
        standard = (divergences - divergences.mean()) / divergences.std()
        alike = 2 * (1 - (standard - standard.min()) / (standard.max() - standard.min()))
        for (j, label), semantic in zip(kept, alike, strict=True):
            slow[i, label] += 0.2 * 0.6 * torch.exp(-2.0 * (1 - images[i] @ images[j] * semantic))
    found = fitted.term(given.stream.vectors, given.logits(given.stream.vectors))
    assert torch.allclose(found, slow, atol=1e-4)


def test_both_levels_count() -> None:
    features, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.6, -0.8], [0.6, 0.8]])
    queries = torch.tensor([[0.9, 0.1]]).log()
    signatures = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]).log()
    found = two_level_similarity(features, keys, queries, signatures)[0]
    # Equally near as features: the key seen alike counts twice its cosine, the one seen most differently nothing.
    assert torch.allclose(found[:2], torch.tensor([1.2, 0.0]), atol=1e-6)
    assert 0 < found[2] < 1.2


def test_representatives_are_sure_and_usual() -> None:
    # Images 0..3 are sure of class 0; image 3 is surest but sees a class where none of the others does.
    sure = [[0.80, 0.199, 0.001], [0.81, 0.189, 0.001], [0.80, 0.199, 0.001], [0.85, 0.075, 0.075]]
    signatures = torch.tensor([*sure, [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]).log()
    chosen = representatives(signatures, 2)
    assert set(chosen.rows[chosen.classes == 0].tolist()) <= {0, 1, 2}
    assert chosen.classes.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match="shots is 0"):
        representatives(signatures, 0)
    assert [shots_of(count, 10) for count in (100, 400, 100_000)] == [9, 12, 16]


def test_it_sees_the_test_images_and_alpha_zero_adds_nothing(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(stream=4)
    source = tiny_source()
    pipeline = Pipeline([Tfup(alpha=0.0)]).fit(given, source)
    assert pipeline.transductive
    (off,) = pipeline.terms
    assert isinstance(off, Tfup) and given.stream is not None
    assert not off.term(given.stream.vectors, torch.zeros(12, 3)).any()


def test_the_cache_corrects_class_vectors_that_stand_beside_their_images(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=5, stream=40, noise=0.35, beside=0.35, seed=1)
    assert given.stream is not None and given.logits is not None
    images: Vectors = given.stream.vectors
    labels = torch.arange(5).repeat_interleave(40)
    base = given.logits(images)
    fitted = Tfup(alpha=5.0, beta=3.0).fit(given, tiny_source())
    plain = given.metric(base, labels)
    assert plain < 0.95
    assert given.metric(base + fitted.term(images, base), labels) > plain
