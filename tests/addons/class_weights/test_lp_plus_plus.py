from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_weights.lp_plus_plus import Blend, LpPlusPlus, blend_at_start, blends, step_sizes
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(given: Reference) -> Problem:
    assert given.few_shot is not None and given.few_shot.labels is not None and given.weights is not None
    return given.few_shot.vectors.pooled, given.few_shot.labels, given.weights.vectors


def test_the_loss_never_rises_with_its_own_steps(blobs: Blobs) -> None:
    for seed in range(5):
        images, labels, texts = problem(blobs(classes=5, shots=8, noise=0.5, seed=seed))
        start = blend_at_start(images, labels, texts, alpha=50.0)
        path = [start, *blends(start, images, labels, texts, 100, momentum=0.0)]
        losses = [F.cross_entropy(one.logits(images, texts), labels) for one in path]
        assert all(later <= before + 1e-6 for before, later in pairwise(losses))
        assert losses[-1] < losses[0] / 2
        fast = list(blends(start, images, labels, texts, 100, momentum=0.9))
        assert F.cross_entropy(fast[-1].logits(images, texts), labels) < losses[-1]


def test_the_path_against_autograd(blobs: Blobs) -> None:
    images, labels, texts = problem(blobs(classes=3, shots=4))
    start = blend_at_start(images, labels, texts, alpha=30.0)
    largest = torch.linalg.matrix_norm(images, 2) ** 2
    step, alpha_step = 4 * 12 / largest, 12 / (4 * max(float(((images @ t) ** 2).sum()) for t in texts))
    assert step_sizes(images, texts) == pytest.approx((float(step), alpha_step), rel=1e-4)
    w, b, a = (one.clone().requires_grad_() for one in start)
    groups = [{"params": [w], "lr": float(step)}, {"params": [b], "lr": 2.0}]
    sgd = torch.optim.SGD(groups, momentum=0.9)
    for epoch in range(1, 22):
        loss = torch.zeros(())
        for image, label in zip(images, labels.tolist(), strict=True):
            row = torch.stack([w[c] @ image + b[c] + a[c] * (image @ texts[c]) for c in range(3)])
            loss = loss + (torch.logsumexp(row, 0) - row[label]) / 12
        sgd.zero_grad()
        a.grad = None
        loss.backward()
        sgd.step()
        if epoch % 10 == 0:
            with torch.no_grad():
                a -= alpha_step * a.grad  # type: ignore[operator]
    found = list(blends(start, images, labels, texts, 21, momentum=0.9))[-1]
    for ours, theirs in zip(found, (w, b, a), strict=True):
        assert torch.allclose(ours, theirs.detach(), atol=1e-3)


def test_the_start_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    start = blend_at_start(images, torch.tensor([0, 0, 1]), texts, alpha=10.0)
    assert torch.equal(start.vectors, torch.tensor([[1.6, 0.8], [0.0, 1.0]]))
    # Mean similarity with the own text: 0.8 for class 0, 1 for class 1.
    assert torch.allclose(start.alpha, torch.tensor([9.0, 9.0]))
    assert torch.equal(start.bias, torch.zeros(2))


def test_scores_are_the_blend(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    fitted = LpPlusPlus(epochs=15).fit(given, tiny_source())
    images, labels, texts = problem(given)
    alpha = 250.0 * 20 / 100
    blend = list(blends(blend_at_start(images, labels, texts, alpha), images, labels, texts, 15, 0.9))[-1]
    scores = fitted.weights(given.class_names, tiny_source()).scores(images)
    assert torch.allclose(20 * scores, blend.logits(images, texts), atol=1e-3)


def test_the_text_helps_when_shots_are_few(blobs: Blobs, tiny_source: Any) -> None:
    def right(keep: float) -> float:
        hits = []
        for seed in range(5):
            given = blobs(classes=8, shots=1, val=True, noise=0.35, beside=0.1, seed=seed)
            images, labels, texts = problem(given)
            start = blend_at_start(images, labels, texts, 50.0)
            *_, end = blends(start._replace(alpha=keep * start.alpha), images, labels, keep * texts, 50, 0.9)
            assert given.val is not None and given.val.labels is not None
            hits.append(given.metric(end.logits(given.val.vectors.pooled, keep * texts), given.val.labels))
        return sum(hits) / 5

    assert right(1.0) > right(0.0) + 0.1


def test_the_epoch_that_does_best_on_validation_images(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True, noise=0.9, beside=0.3, shots=2, seed=4)
    images, labels, texts = problem(given)
    fitted = LpPlusPlus(epochs=40).fit(given, tiny_source())
    path = list(blends(blend_at_start(images, labels, texts, 50.0), images, labels, texts, 40, 0.9))
    assert given.val is not None and given.val.labels is not None

    def right(blend: Blend) -> float:
        assert given.val is not None and given.val.labels is not None
        return given.metric(blend.logits(given.val.vectors.pooled, texts), given.val.labels)

    scores = fitted.weights(given.class_names, tiny_source()).scores(given.val.vectors.pooled)
    assert given.metric(scores, given.val.labels) == max(map(right, path))


def test_weights_that_depend_on_the_image_are_refused(blobs: Blobs, tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match="depend on the image"):
        LpPlusPlus().fit(replace(blobs(), weights=None), tiny_source())
