from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_weights.clap import LENGTH, Clap, known_before
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]


def test_what_was_known_before_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2]])
    assert torch.allclose(known_before(probabilities, torch.tensor([0, 0, 1])), torch.tensor([0.7, 0.2]))


def test_a_huge_strength_keeps_the_class_vectors(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(beside=0.8)
    assert given.weights is not None
    kept, free = (Clap(strength=one).fit(given, tiny_source()).vectors for one in (1e6, 0.0))
    assert torch.allclose(kept, given.weights.vectors, atol=1e-4)  # type: ignore[arg-type]
    assert (free - given.weights.vectors).norm(dim=1).min() > 0.1  # type: ignore[operator]


def objective(vectors: torch.Tensor, given: Reference, strength: float) -> torch.Tensor:
    """The paper's loss, image by image and class by class."""
    assert given.few_shot is not None and given.few_shot.labels is not None
    assert given.weights is not None and given.logits is not None
    images, labels = given.few_shot.vectors.pooled, given.few_shot.labels.tolist()
    known = [
        float(given.logits(given.few_shot.vectors).softmax(-1)[[i for i, y in enumerate(labels) if y == c], c].mean())
        for c in range(len(vectors))
    ]
    total = torch.zeros(())
    for image, label in zip(images, labels, strict=True):
        row = torch.stack([20 * image @ w / w.norm() for w in vectors])
        total = total + (torch.logsumexp(row, 0) - row[label]) / len(labels)
    away = ((vectors - LENGTH * given.weights.vectors) ** 2).sum(1)
    return total + strength * torch.stack([a * d for a, d in zip(known, away, strict=True)]).mean()


def test_it_ends_near_the_optimum_of_the_objective(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=2, shots=3, noise=0.4, beside=0.8)
    assert given.few_shot is not None and given.weights is not None
    shots, start = given.few_shot.vectors, LENGTH * given.weights.vectors
    # Views equal to the image: then every step sees the whole objective.
    given = replace(
        given,
        few_shot=replace(given.few_shot, vectors=replace(shots, views=shots.pooled[:, None])),
    )
    best = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([best], max_iter=200, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> float:
        solver.zero_grad()
        loss = objective(best, given, 1.0)
        loss.backward()
        return loss.item()

    solver.step(closure)
    found = Clap(strength=1.0, lr=0.5, epochs=600).fit(given, tiny_source()).vectors
    assert found is not None
    assert torch.allclose(found, F.normalize(best.detach(), dim=-1), atol=2e-3)


def test_a_class_that_was_known_stays_nearer(tiny_source: Any, blobs: Blobs) -> None:
    # Classes 0 and 1 are wrong by as much; the zero-shot model is sure of class 0's images and unsure of class 1's.
    given = blobs(classes=2, shots=4, beside=0.6, noise=0.3, seed=2)
    assert given.few_shot is not None and given.few_shot.labels is not None and given.weights is not None
    labels = given.few_shot.labels

    def moved(sure: int) -> torch.Tensor:
        right = torch.where(labels == sure, 0.99, 0.01)
        told = torch.where(F.one_hot(labels, 2).bool(), right[:, None], 1 - right[:, None]).log()
        seen = replace(given, logits=lambda images: told)
        fitted = Clap(epochs=100).fit(seen, tiny_source())
        assert fitted.vectors is not None and given.weights is not None
        away: torch.Tensor = torch.linalg.vector_norm(fitted.vectors - given.weights.vectors, dim=1)
        return away

    first, second = moved(0), moved(1)
    assert first[0] < second[0]
    assert second[1] < first[1]


def test_it_learns_and_gives_what_it_learned(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(noise=0.4, beside=0.8)
    assert given.few_shot is not None and given.few_shot.labels is not None and given.weights is not None
    source = tiny_source()
    weights = Clap().fit(given, source).weights(given.class_names, source)
    assert torch.allclose(weights.vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    before, after = (
        F.cross_entropy(20 * one.scores(given.few_shot.vectors.pooled), given.few_shot.labels)
        for one in (given.weights, weights)
    )
    assert after < before - 0.1


def test_what_it_refuses(blobs: Blobs, tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match="depend on the image"):
        Clap().fit(replace(blobs(), weights=None), tiny_source())
    with pytest.raises(ConfigError, match="cannot be negative"):
        Clap(strength=-1.0).fit(blobs(), tiny_source())
