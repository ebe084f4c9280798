import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.reference import Part, Reference
from vlkit.addons.terms.knn import Knn, neighbour_shares
from vlkit.errors import ConfigError, DataError

Blobs = Callable[..., Reference]


def test_shares_against_a_loop() -> None:
    similarity = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    labels = [0, 1, 2, 0, 1, 0]
    expected = torch.zeros(3, 3)
    for row in range(3):
        nearest = sorted(range(6), key=lambda j: -float(similarity[row, j]))[:4]
        votes = [math.exp(float(similarity[row, j]) / 0.5) for j in nearest]
        for j, vote in zip(nearest, votes, strict=True):
            expected[row, labels[j]] += vote / sum(votes)
    found = neighbour_shares(similarity, F.one_hot(torch.tensor(labels), 3).float(), 4, 0.5)
    assert torch.allclose(found, expected, atol=1e-6)


def test_probabilities_are_the_mixture(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True)
    fitted = Knn(mix=0.3, k=5, epochs=0).fit(given, tiny_source())
    assert given.val is not None and given.logits is not None and fitted.keys is not None and fitted.values is not None
    images = given.val.vectors
    base = given.logits(images)
    shares = neighbour_shares(images.pooled @ fitted.keys.T, fitted.values, 5, 1.0)
    expected = 0.7 * base.softmax(-1) + 0.3 * shares
    assert torch.allclose((base + fitted.term(images, base)).softmax(-1), expected, atol=1e-5)


def test_no_neighbours_and_no_training_is_zero_shot(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    assert given.few_shot is not None and given.logits is not None
    base = given.logits(given.few_shot.vectors)
    fitted = Knn(mix=0.0, epochs=0).fit(given, tiny_source())
    after = base + fitted.term(given.few_shot.vectors, base)
    assert torch.allclose(after.softmax(-1), base.softmax(-1), atol=1e-6)


def test_neighbours_answer_where_names_say_nothing(tiny_source: Any, blobs: Blobs) -> None:
    given = replace(blobs(noise=0.1), logits=lambda images: torch.zeros(len(images), 3))
    assert given.few_shot is not None and given.few_shot.labels is not None
    images, labels = given.few_shot.vectors, given.few_shot.labels
    base = torch.zeros(12, 3)

    def right(mix: float) -> float:
        return given.metric(base + Knn(mix=mix, k=3, epochs=0).fit(given, tiny_source()).term(images, base), labels)

    assert right(0.5) == 1.0
    assert right(0.0) < 0.5


def test_hard_examples_count_more_in_training(tiny_source: Any, blobs: Blobs) -> None:
    # Image 5 looks like class 0 but is of class 1: none of its neighbours has its class.
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 16, generator=random)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    looks = torch.tensor([0, 0, 0, 1, 1, 0])
    shots = F.normalize(centres[looks] + 0.4 * torch.randn(6, 16, generator=random), dim=-1)
    given = replace(
        blobs(classes=2),
        few_shot=Part("train", Vectors("image", shots), labels),
        logits=lambda images: torch.zeros(len(images), 2),
    )

    def loss_of_hard(hard: float) -> float:
        fitted = Knn(mix=0.0, hard=hard, k=2).fit(given, tiny_source())
        term = fitted.term(Vectors("image", shots), torch.zeros(6, 2))
        return float(F.cross_entropy(term[5:], labels[5:]))

    assert loss_of_hard(1.0) < loss_of_hard(0.0) - 0.05


def test_one_step_by_hand(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=2, shots=3, noise=0.8)
    fitted = Knn(mix=0.0, hard=0.5, k=2, epochs=1).fit(given, tiny_source())
    shots, logits = given.few_shot, given.logits
    assert shots is not None and shots.labels is not None and logits is not None
    x, labels = shots.vectors.pooled, shots.labels.tolist()
    vectors, bias = torch.zeros(2, 16, requires_grad=True), torch.zeros(2, requires_grad=True)
    total = torch.zeros(())
    for i in range(6):
        nearest = sorted((j for j in range(6) if j != i), key=lambda j: -float(x[i] @ x[j]))[:2]
        votes = {j: math.exp(float(x[i] @ x[j])) for j in nearest}
        own = sum(vote for j, vote in votes.items() if labels[j] == labels[i]) / sum(votes.values())
        hardness = min(100.0, -math.log(own)) if own > 0 else 100.0
        row = logits(shots.vectors.rows([i]))[0] + 20 * vectors @ x[i] + bias
        total = total + (1 + 0.5 * hardness) * (torch.logsumexp(row, 0) - row[labels[i]])
    (total / 6).backward()
    assert vectors.grad is not None and bias.grad is not None
    # AdamW's first step from zero: the learning rate against the sign of the gradient.
    step = -1e-3 * vectors.grad / (vectors.grad.abs() + 1e-8)
    assert torch.allclose(fitted.vectors, step, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(fitted.bias, -1e-3 * bias.grad / (bias.grad.abs() + 1e-8), atol=1e-6)  # type: ignore[arg-type]


def test_the_mix_is_chosen_on_validation_images(blobs: Blobs, tiny_source: Any) -> None:
    given = replace(blobs(val=True, noise=0.1), logits=lambda images: torch.zeros(len(images), 3))
    assert Knn(epochs=0).fit(given, tiny_source()).mix == 0.05  # the least that is right
    assert Knn(epochs=0).fit(blobs(), tiny_source()).mix == 0.1
    assert Knn(mix=0.7, epochs=0).fit(given, tiny_source()).mix == 0.7


def test_what_it_refuses(blobs: Blobs, tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match=r"mix 1\.5"):
        Knn(mix=1.5).fit(blobs(), tiny_source())
    with pytest.raises(ConfigError, match="k 0"):
        Knn(k=0).fit(blobs(), tiny_source())
    with pytest.raises(DataError, match="no neighbour of itself"):
        Knn().fit(blobs(classes=1, shots=1), tiny_source())
