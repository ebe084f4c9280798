from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.feature_maps.task_residual import TaskResidual
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]
IMAGES = Vectors("image", torch.empty(0, 16))


def test_no_strength_and_no_training_change_nothing(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    assert given.weights is not None
    texts = Vectors("text", given.weights.vectors)
    for addon in (TaskResidual(alpha=0.0, epochs=5), TaskResidual(epochs=0)):
        assert torch.allclose(addon.fit(given, tiny_source()).map(IMAGES, texts)[1].pooled, texts.pooled, atol=1e-6)


def test_two_steps_by_hand(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=2, shots=2)
    # One image a step would warm up too; with all in one, the first epoch is warm-up and the second the first step.
    fitted = TaskResidual(epochs=2).fit(given, tiny_source())
    shots, weights = given.few_shot, given.weights
    assert shots is not None and shots.vectors.views is not None and shots.labels is not None and weights is not None
    residual = torch.zeros(2, 16, requires_grad=True)
    adam = torch.optim.Adam([residual], weight_decay=5e-4)
    for number, lr in enumerate((1e-5, 2e-3)):
        total = torch.zeros(())
        for i, label in enumerate(shots.labels.tolist()):
            moved = [weights.vectors[c] + 0.5 * residual[c] for c in range(2)]
            row = torch.stack([20 * shots.vectors.views[i, number] @ one / one.norm() for one in moved])
            total = total + torch.logsumexp(row, 0) - row[label]
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        (total / 4).backward()
        adam.step()
    assert torch.allclose(fitted.residual, residual.detach(), atol=1e-5)  # type: ignore[arg-type]


def test_residuals_learn_from_the_shots(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(noise=0.4, beside=0.8)
    assert given.weights is not None and given.few_shot is not None and given.few_shot.labels is not None
    texts = Vectors("text", given.weights.vectors)
    fitted = TaskResidual().fit(given, tiny_source())
    images, moved = fitted.map(given.few_shot.vectors, texts)
    assert images is given.few_shot.vectors
    assert torch.allclose(moved.pooled.norm(dim=1), torch.ones(3), atol=1e-5)
    before, after = (
        F.cross_entropy(20 * images.pooled @ one.pooled.T, given.few_shot.labels) for one in (texts, moved)
    )
    assert after < before - 0.1


def test_other_class_vectors_are_refused(blobs: Blobs, tiny_source: Any) -> None:
    fitted = TaskResidual(epochs=1).fit(blobs(), tiny_source())
    assert not len(fitted.map(IMAGES, Vectors("text", torch.empty(0, 16)))[1])
    with pytest.raises(ConfigError, match="each of 3 class vectors, but there are 5"):
        fitted.map(IMAGES, Vectors("text", torch.ones(5, 16)))
    with pytest.raises(ConfigError, match="depend on the image"):
        TaskResidual().fit(replace(blobs(), weights=None), tiny_source())


def test_each_name_of_a_class_has_its_own(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=2)
    assert given.weights is not None
    twice = ClassWeights(given.weights.vectors.repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1]), reduce="mean")
    fitted = TaskResidual(epochs=3).fit(replace(given, weights=twice), tiny_source())
    assert fitted.residual is not None and fitted.residual.shape == (4, 16)
