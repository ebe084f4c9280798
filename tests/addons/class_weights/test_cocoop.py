"""CoCoOp: without its network it is CoOp; with it each image has weights of its own, as a loop makes them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.class_weights.cocoop import CoCoOp
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.exchange import ImageConditionedWeights
from vlkit.addons.prompt_fit import parameter

NAMES = ["dog", "black cat", "boat"]


def test_without_its_network_it_is_coop(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    fitted = CoCoOp(lr=0.0, epochs=1, batch_size=4).fit(given, small())
    silent = replace(fitted, up=torch.zeros_like(fitted.up), up_bias=torch.zeros_like(fitted.up_bias))
    coop = CoOp(words="a photo of a", lr=0.0, epochs=1).fit(given, small())
    images = given.few_shot.vectors
    made = silent.weights(given.class_names, small())
    assert isinstance(made, ImageConditionedWeights)
    expected = coop.weights(given.class_names, small()).scores(images.pooled)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(made.scores(images), expected, atol=1e-6)
    loud = fitted.weights(given.class_names, small()).scores(images)
    assert not torch.allclose(loud, expected, atol=1e-3)


def test_loss_of_each_image_with_its_own_words(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = CoCoOp(lr=0.0, epochs=1, batch_size=6).fit(given, source)
    task = fitted.task(given, source, fitted.examples(given))
    found = {name: parameter(getattr(fitted, name)) for name in ("vectors", "down", "down_bias", "up", "up_bias")}
    rows = torch.tensor([1, 4, 8])
    loss = fitted.objective(task, found)(rows).item()
    logits = []
    for row in rows.tolist():
        image = task.images[row]
        hidden = [max(0.0, (a @ image + b).item()) for a, b in zip(found["down"], found["down_bias"], strict=True)]
        shift = found["up"] @ torch.tensor(hidden) + found["up_bias"]
        words = torch.stack([vector + shift for vector in found["vectors"]])
        logits.append(source.logit_scale * task.text.features(words) @ image)
    assert loss == pytest.approx(cross_entropy(torch.stack(logits), task.labels[rows]), abs=1e-5)


def test_the_network_is_trained(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, noise=0.3)
    still, moved = (CoCoOp(lr=lr, epochs=3, batch_size=4).fit(given, small()) for lr in (0.0, 0.1))
    for name in ("vectors", "down", "up", "up_bias"):
        assert not torch.equal(getattr(still, name), getattr(moved, name)), name
