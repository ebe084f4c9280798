from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.feature_maps.clip_adapter import ClipAdapter
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]
TEXTS = Vectors("text", torch.empty(0, 16))


def test_against_the_equation(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    fitted = ClipAdapter(ratio=0.4, epochs=2).fit(given, tiny_source())
    assert given.few_shot is not None and fitted.down is not None and fitted.up is not None
    assert fitted.down.shape == (4, 16) and fitted.up.shape == (16, 4)
    images = given.few_shot.vectors
    found = fitted.map(images, TEXTS)[0]
    for row, image in zip(found.pooled, images.pooled, strict=True):
        inner = [max(0.0, float(weights @ image)) for weights in fitted.down]
        outer = torch.tensor([max(0.0, float(weights @ torch.tensor(inner))) for weights in fitted.up])
        assert torch.allclose(row, F.normalize(0.4 * outer + 0.6 * image, dim=0), atol=1e-5)
        # The encoder's own length does not matter: the network has no biases.
        raw = 7.5 * image
        longer = 0.4 * torch.relu(torch.relu(raw @ fitted.down.T) @ fitted.up.T) + 0.6 * raw
        assert torch.allclose(row, F.normalize(longer, dim=0), atol=1e-5)


def test_ratio_zero_changes_nothing(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    assert given.few_shot is not None
    fitted = ClipAdapter(ratio=0.0).fit(given, tiny_source())
    assert fitted.map(given.few_shot.vectors, TEXTS)[0] is given.few_shot.vectors


def loss_after(epochs: int, given: Reference, source: Any) -> float:
    fitted = ClipAdapter(ratio=0.6, epochs=epochs, lr=1e-2).fit(given, source)
    assert given.few_shot is not None and given.logits is not None and given.few_shot.labels is not None
    return float(F.cross_entropy(given.logits(fitted.map(given.few_shot.vectors, TEXTS)[0]), given.few_shot.labels))


def test_the_network_learns_from_the_shots(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(noise=0.4, beside=0.6)
    assert loss_after(60, given, tiny_source()) < loss_after(0, given, tiny_source()) - 0.1


def test_the_ratio_is_chosen_on_validation_images(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True, beside=0.8)
    assert given.val is not None and given.val.labels is not None and given.logits is not None

    def right(ratio: float | None) -> float:
        fitted = ClipAdapter(ratio=ratio, epochs=20).fit(given, tiny_source())
        assert given.val is not None and given.val.labels is not None and given.logits is not None
        return given.metric(given.logits(fitted.map(given.val.vectors, TEXTS)[0]), given.val.labels)

    assert right(None) == max(right(ratio) for ratio in (0.2, 0.4, 0.6, 0.8))
    assert ClipAdapter(epochs=1).fit(blobs(), tiny_source()).ratio == 0.2


def test_what_it_refuses(blobs: Blobs, tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match="depend on the image"):
        ClipAdapter().fit(replace(blobs(), weights=None), tiny_source())
    with pytest.raises(ConfigError, match="reduction is 0"):
        ClipAdapter(reduction=0).fit(blobs(), tiny_source())


def test_views_that_later_addons_are_fitted_on_are_changed_too(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    fitted = ClipAdapter(ratio=0.5, epochs=1).fit(given, tiny_source())
    assert given.few_shot is not None and given.few_shot.vectors.views is not None
    seen = Pipeline([fitted]).map(given.few_shot.vectors, TEXTS)[0].views
    assert seen is not None and seen.shape == (12, 3, 16)
    for number in range(3):
        alone = Vectors("image", given.few_shot.vectors.views[:, number])
        assert torch.allclose(seen[:, number], fitted.map(alone, TEXTS)[0].pooled, atol=1e-6)
