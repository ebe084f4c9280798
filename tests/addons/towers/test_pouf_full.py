"""POUF for whole models: its loss in loops, no labels, both towers, and everything put back."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.pipeline import Pipeline
from vlkit.addons.saved import load_addon, save_addon
from vlkit.addons.towers.pouf_full import PoufFull
from vlkit.errors import ConfigError

SHORT: dict[str, Any] = {"crop": 1.0, "batch_size": 6, "epochs": 6, "lr": 1e-3}


@pytest.fixture
def unlabelled(tower_case: Any) -> Any:
    """The pictures without their labels."""
    images = replace(tower_case.reference.few_shot, labels=None)
    return replace(tower_case.reference, few_shot=None, images=images)


def softmax(values: list[float]) -> list[float]:
    parts = [math.exp(one - max(values)) for one in values]
    return [one / sum(parts) for one in parts]


def slow_loss(similarity: list[list[float]], scale: float) -> float:
    count, classes = len(similarity), len(similarity[0])
    chances = [softmax([scale * one for one in row]) for row in similarity]
    shares = [softmax([scale * similarity[i][c] for i in range(count)]) for c in range(classes)]
    cost = sum(chances[i][c] * (1 - similarity[i][c]) for i in range(count) for c in range(classes)) / count
    cost += sum(shares[c][i] * (1 - similarity[i][c]) for i in range(count) for c in range(classes)) / classes
    entropy = -sum(p * math.log(p) for row in chances for p in row) / count
    mean = [sum(row[c] for row in chances) / count for c in range(classes)]
    return cost + 0.3 * (entropy + sum(p * math.log(p) for p in mean))


def test_the_loss_in_loops_and_its_gradient_in_both_towers(tower_case: Any, unlabelled: Any) -> None:
    addon, rows = PoufFull(crop=1.0), torch.tensor([1, 6, 10, 3])
    task = addon_task(addon, unlabelled, tower_case)
    with addon.training(task) as found:
        loss = addon.objective(task, found)(rows)
        loss.backward()
        names = {name.split(".")[1] for name, one in tower_case.encoder.named_parameters() if one.grad is not None}
        images = tower_case.encoder.encode_image(addon_task(addon, unlabelled, tower_case).pixels.batch(rows))
    assert {"visual", "text"} <= names
    assert not any("logit_scale" in name for name in names)
    prompts = tower_case.source.embed_texts([f"a photo of a {name}" for name in ("red", "green", "lime", "blue")])
    cosines = images @ prompts.T
    best = torch.stack([cosines[:, 0], cosines[:, 1:3].amax(1), cosines[:, 3]], dim=1)
    assert loss.item() == pytest.approx(slow_loss(best.tolist(), tower_case.source.logit_scale), abs=1e-4)


def addon_task(addon: Any, reference: Any, case: Any) -> Any:
    from vlkit.addons.base import Fitted

    card = case.source.card
    fitted = Fitted(card.fingerprint, card.logit_scale, "classification")
    seen = Pipeline()._seen_by(addon, reference, case.source, "photo")
    return replace(addon, fitted=fitted).task(seen, case.source)


def test_training_lowers_the_loss_and_looks_at_no_label(tower_case: Any, unlabelled: Any, tmp_path: Any) -> None:
    encoder = tower_case.encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    pipeline = Pipeline([PoufFull(**SHORT)]).fit(unlabelled, tower_case.source, "photo")
    fitted: Any = pipeline.addons[0]
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items()), "put back"
    assert all(one.requires_grad and one.grad is None for one in encoder.parameters())
    turned = replace(tower_case.reference.few_shot, labels=tower_case.reference.few_shot.labels.flip(0))
    with_labels = replace(unlabelled, few_shot=turned)
    assert Pipeline([PoufFull(**SHORT)]).fit(with_labels, tower_case.source, "photo").addons[0].key == fitted.key
    values = list(losses(tower_case, unlabelled, fitted))
    assert values[1] < values[0] - 0.02
    loaded: Any = load_addon(save_addon(fitted, tmp_path / "pouf"))
    with loaded.edit(encoder):
        inside = encoder.encode_image(tower_case.images), encoder.encode_text(tower_case.tokens)
    outside = encoder.encode_image(tower_case.images), encoder.encode_text(tower_case.tokens)
    assert not any(torch.allclose(one, other, atol=1e-4) for one, other in zip(inside, outside, strict=True))
    assert loaded.template == "a photo of a {}" and fitted.steps == 12


def losses(case: Any, reference: Any, fitted: Any) -> Iterator[float]:
    """Of all images at once, before and after."""
    for addon in (None, fitted):
        task = addon_task(PoufFull(crop=1.0), reference, case)
        rows = torch.arange(12)
        with torch.no_grad():
            if addon is None:
                yield float(PoufFull().objective(task, {})(rows))
            else:
                with addon.edit(case.encoder):
                    yield float(PoufFull().objective(task, {})(rows))


def test_bad_input(tower_case: Any, unlabelled: Any) -> None:
    with pytest.raises(ConfigError, match="unlabelled_images"):
        Pipeline([PoufFull()]).fit(replace(unlabelled, images=None), tower_case.source)
    without = replace(unlabelled, images=replace(unlabelled.images, records=()))
    with pytest.raises(ConfigError, match="images that can be read anew"):
        Pipeline([PoufFull()]).fit(without, tower_case.source)
    small = replace(PoufFull(), weights=torch.zeros(5))
    with pytest.raises(ConfigError, match="5 weights do not fit this model of"), small.edit(tower_case.encoder):
        pass
