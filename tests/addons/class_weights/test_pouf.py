"""POUF: both parts of its loss in loops, and that it makes classes clear and even without labels."""

import math
from typing import Any

import pytest
import torch

from vlkit.addons.class_weights.pouf import Pouf, transport_cost, unclear
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    parts = [math.exp(one - top) for one in values]
    return [one / sum(parts) for one in parts]


def slow(similarity: list[list[float]], scale: float) -> tuple[float, float]:
    rows, columns = len(similarity), len(similarity[0])
    chances = [softmax([scale * one for one in row]) for row in similarity]
    by_class = [softmax([scale * similarity[i][c] for i in range(rows)]) for c in range(columns)]
    moved = sum(chances[i][c] * (1 - similarity[i][c]) for i in range(rows) for c in range(columns)) / rows
    moved += sum(by_class[c][i] * (1 - similarity[i][c]) for i in range(rows) for c in range(columns)) / columns
    each = -sum(p * math.log(p) for row in chances for p in row) / rows
    mean = [sum(row[c] for row in chances) / rows for c in range(columns)]
    return moved, each + sum(p * math.log(p) for p in mean)


def test_both_parts_in_loops() -> None:
    similarity = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).double()
    moved, mixed = slow(similarity.tolist(), 8.0)
    assert transport_cost(8.0 * similarity, similarity).item() == pytest.approx(moved)
    assert unclear(8.0 * similarity).item() == pytest.approx(mixed)
    sure_and_even = 50 * torch.eye(3)
    assert unclear(sure_and_even).item() == pytest.approx(-math.log(3), abs=1e-6)


def test_the_loss_and_what_it_starts_from(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = Pouf(lr=0.0, epochs=1).fit(given, source)
    hand = source.embed_texts([f"a photo of a {name}." for name in NAMES])
    assert torch.allclose(fitted.weights(given.class_names, source).vectors, hand, atol=1e-6)
    task = fitted.task(given, source, fitted.examples(given))
    found = {"vectors": parameter(task.text.words[0]), "log_scale": parameter(torch.tensor(0.2))}
    loss = fitted.objective(task, found)(torch.arange(7)).item()
    moved, mixed = slow((task.images[:7] @ hand.T).tolist(), source.logit_scale * math.exp(0.2))
    assert loss == pytest.approx(moved + 0.3 * mixed, abs=1e-5)


def test_training_lowers_it_and_the_scale_is_in_the_weights(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES, shots=8, noise=0.3), small()
    assert given.images is not None
    values = []
    for lr in (0.0, 0.05):
        fitted = Pouf(lr=lr, scale_lr=lr, epochs=15).fit(given, source)
        scores = fitted.weights(given.class_names, source).scores(given.images.vectors.pooled)
        scale = float(fitted.log_scale.exp())  # type: ignore[union-attr]
        logits = source.logit_scale * scores
        values.append((transport_cost(logits, scores / scale) + 0.3 * unclear(logits)).item())
    assert scale != 1.0 and values[1] < values[0] - 0.01
    norm = fitted.weights(given.class_names, source).vectors.norm(dim=1)
    assert torch.allclose(norm, torch.full((3,), scale), atol=1e-5)


def test_the_scale_learns_at_a_rate_of_its_own(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES, shots=8, noise=0.3), small()
    slow, fast = (Pouf(lr=1e-4, scale_lr=rate, epochs=2).fit(given, source).log_scale for rate in (1e-4, 2e-4))
    assert slow is not None and fast is not None and slow.abs() > 0
    assert (fast / slow).item() == pytest.approx(2, rel=0.02)
    assert Pouf(lr=0.01, scale_lr=0.0, epochs=2).fit(given, source).log_scale == 0


def test_it_needs_images_and_no_labels(small: Any, labelled: Any) -> None:
    from dataclasses import replace

    assert "few_shot_labels" not in Pouf.needs
    with pytest.raises(ConfigError, match="unlabelled_images"):
        Pouf().fit(replace(labelled(NAMES), images=None), small())
