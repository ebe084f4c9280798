from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.cache_model import divergence
from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import Vectors
from vlkit.addons.reference import Part, Reference
from vlkit.addons.terms.tip_adapter import TipAdapter
from vlkit.addons.terms.tip_x import TipX
from vlkit.errors import DataError

Blobs = Callable[..., Reference]


def test_without_signatures_it_is_tip_adapter(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    assert given.few_shot is not None and given.logits is not None
    images = given.few_shot.vectors
    base = given.logits(images)
    plain = TipAdapter(alpha=2.0, beta=3.0).fit(given, tiny_source())
    mixed = TipX(alpha=2.0, beta=3.0, gamma=0.0).fit(given, tiny_source())
    assert torch.equal(plain.term(images, base), mixed.term(images, base))


def test_against_the_equations_in_a_slow_loop(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(shots=2)
    fitted = TipX(alpha=1.5, beta=4.0, gamma=2.0).fit(given, tiny_source())
    shots, weights = given.few_shot, given.weights
    assert shots is not None and shots.vectors.views is not None and shots.labels is not None and weights is not None
    keys = F.normalize(shots.vectors.views.mean(1), dim=-1)
    images = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(5)), dim=-1)

    def signature(vector: torch.Tensor) -> torch.Tensor:
        return torch.softmax(vector @ weights.vectors.T / 0.5, 0)

    def apart(p: torch.Tensor, q: torch.Tensor) -> float:
        return float(sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)))

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    of_keys = [apart(signature(keys[i]), signature(keys[j])) for i, j in pairs]
    alike = [float(keys[i] @ keys[j]) for i, j in pairs]
    slow = torch.zeros(4, 3)
    for i, image in enumerate(images):
        for j, label in enumerate(shots.labels.tolist()):
            slow[i, label] += 0.2 * 1.5 * torch.exp(-4.0 * (1 - image @ keys[j]))
            share = (apart(signature(image), signature(keys[j])) - min(of_keys)) / (max(of_keys) - min(of_keys))
            slow[i, label] += 0.2 * 2.0 * -(min(alike) + share * (max(alike) - min(alike)))
    assert given.logits is not None
    queries = Vectors("image", images)
    assert torch.allclose(fitted.term(queries, given.logits(queries)), slow, atol=1e-5)


def test_it_tells_apart_by_signature_what_features_cannot(tiny_source: Any) -> None:
    # Keys 0 and 1 are as near to the image as each other; the classes see the image as they see key 0.
    rows = [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.1, 0.0]]
    keys = F.normalize(torch.tensor(rows), dim=-1)
    image = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    of_keys = torch.tensor([[9.0, -9.0, 0.0], [-9.0, 9.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    base = of_keys[:1]

    def logits(images: Vectors) -> torch.Tensor:
        return base if len(images) == 1 else of_keys

    shots = Part("train", Vectors("image", keys, views=keys[:, None]), torch.tensor([0, 1, 2, 2]))
    given = Reference(class_names=tuple(parse_class(name) for name in "abc"), few_shot=shots, logits=logits)
    queries = Vectors("image", image)
    term = TipX(alpha=1.0, beta=1.0, gamma=1.0).fit(given, tiny_source()).term(queries, base)
    by_features = TipAdapter(alpha=1.0, beta=1.0).fit(given, tiny_source()).term(queries, base)
    assert by_features[0, 0] == by_features[0, 1]
    assert term[0, 0] > term[0, 1] + 0.01


def test_keys_that_all_look_alike_to_the_classes_tell_nothing(blobs: Blobs, tiny_source: Any) -> None:
    given = replace(blobs(), logits=lambda images: torch.zeros(len(images), 3))
    assert given.few_shot is not None
    fitted = TipX(alpha=1.0, beta=1.0, gamma=1.0).fit(given, tiny_source())
    term = fitted.term(given.few_shot.vectors, torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    plain = TipAdapter(alpha=1.0, beta=1.0).fit(given, tiny_source()).term(given.few_shot.vectors, torch.zeros(12, 3))
    assert torch.allclose((term - plain).std(dim=1), torch.zeros(12), atol=1e-5)


def test_an_image_scores_the_same_alone(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True)
    fitted = TipX().fit(given, tiny_source())
    assert given.val is not None and given.logits is not None
    images = given.val.vectors
    together = fitted.term(images, given.logits(images))
    alone = fitted.term(images.rows([3]), given.logits(images.rows([3])))
    assert torch.allclose(together[3:4], alone, atol=1e-6)


def test_the_constants_that_do_best_on_validation_images(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True, beside=0.8)
    assert given.val is not None and given.val.labels is not None and given.logits is not None
    base = given.logits(given.val.vectors)
    chosen = TipX().fit(given, tiny_source())
    reached = given.metric(base + chosen.term(given.val.vectors, base), given.val.labels)
    assert reached >= given.metric(base, given.val.labels)
    assert TipX(gamma=3.0).fit(given, tiny_source()).gamma == 3.0
    fixed = TipX(gamma=0.5).fit(blobs(), tiny_source())
    assert (fixed.alpha, fixed.beta, fixed.gamma) == (1.17, 1.0, 0.5)


def test_divergence_of_equals_is_zero_and_a_single_image_is_refused(blobs: Blobs, tiny_source: Any) -> None:
    logs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert torch.allclose(divergence(logs, logs).diagonal(), torch.zeros(3), atol=1e-6)
    with pytest.raises(DataError, match="at least two"):
        TipX().fit(blobs(classes=1, shots=1), tiny_source())
