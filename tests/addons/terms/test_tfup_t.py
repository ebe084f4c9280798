import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import ClassWeights
from vlkit.addons.reference import Reference
from vlkit.addons.terms.tfup_t import TfupT, cross_entropy_of, marginal_entropy
from vlkit.addons.unlabelled_cache import two_level_similarity
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]


def test_the_parts_of_the_loss() -> None:
    even = torch.tensor([[9.0, 0.0], [0.0, 9.0]])  # each sure, together undecided
    assert marginal_entropy(even).item() == pytest.approx(math.log(2), abs=1e-4)
    assert marginal_entropy(torch.tensor([[99.0, 0.0]] * 2)).item() == pytest.approx(0.0, abs=1e-4)
    logits, labels = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1, 1])
    some = torch.tensor([True, True, False])
    expected = (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2
    assert cross_entropy_of(logits, labels, some).item() == pytest.approx(expected, abs=1e-6)
    assert cross_entropy_of(logits, labels, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_what_it_adds_makes_the_adapted_answer(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(stream=12)
    fitted = TfupT(alpha=0.6, beta=2.0, epochs=3).fit(given, tiny_source())
    assert given.stream is not None and given.logits is not None
    assert fitted.down is not None and fitted.up is not None and fitted.texts is not None
    assert fitted.keys is not None and fitted.values is not None
    x = given.stream.vectors.pooled
    small = torch.clamp(torch.clamp(x @ fitted.down.T, min=0) @ fitted.up.T, min=0)
    adapted = F.normalize(0.2 * small + 0.8 * x, dim=-1)
    p, q = ((10 * one @ fitted.texts.T).log_softmax(-1) for one in (adapted, fitted.keys))
    alike = two_level_similarity(adapted, fitted.keys, p, q)
    expected = 20 * adapted @ fitted.texts.T + 0.2 * 0.6 * torch.exp(-2 * (1 - alike)) @ fitted.values
    base = given.logits(given.stream.vectors)
    assert torch.allclose(base + fitted.term(given.stream.vectors, base), expected, atol=1e-4)
    # The text side: half the class vector, half what was learned.
    assert torch.allclose(fitted.texts.norm(dim=1), torch.ones(3), atol=1e-5)
    assert not torch.allclose(fitted.texts, fitted.plain, atol=1e-3)  # type: ignore[arg-type]


def test_training_helps_where_class_vectors_stand_beside_their_images(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=5, stream=40, noise=0.3, beside=0.3, seed=1)
    assert given.stream is not None and given.logits is not None
    labels = torch.arange(5).repeat_interleave(40)
    base = given.logits(given.stream.vectors)
    fitted = TfupT(alpha=0.0, lr=0.003).fit(given, tiny_source())
    adapted = base + fitted.term(given.stream.vectors, base)
    assert given.metric(adapted, labels) > given.metric(base, labels)


def test_the_entropy_of_the_mean_keeps_classes_from_being_forgotten(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=4, stream=30, noise=0.6, beside=0.6, seed=2)
    assert given.stream is not None and given.logits is not None
    base = given.logits(given.stream.vectors)

    def entropy(weight: float) -> float:
        fitted = TfupT(alpha=0.0, marginal_weight=weight).fit(given, tiny_source())
        return float(marginal_entropy(base + fitted.term(given.stream.vectors, base)))  # type: ignore[union-attr]

    assert entropy(0.3) > entropy(0.0) + 0.005


def test_it_starts_from_text_features(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(stream=4)
    learned = ClassWeights(3 * torch.ones(3, 16), torch.arange(3))
    with pytest.raises(ConfigError, match="starts from text features"):
        TfupT().fit(replace(given, weights=learned), tiny_source())
    with pytest.raises(ConfigError, match="depend on the image"):
        TfupT().fit(replace(given, weights=None), tiny_source())
