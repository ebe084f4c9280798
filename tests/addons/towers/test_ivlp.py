from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.templates import Templates
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.towers.ivlp import Ivlp
from vlkit.errors import ConfigError

SHORT = {"epochs": 6, "lr": 0.05, "batch_size": 6, "crop": 0.5}


def test_learns_and_leaves_the_model_as_it_was(learned_well: Any) -> None:
    fitted = learned_well(Ivlp(**SHORT))
    assert fitted.text.shape == (2, 2, 24) and fitted.image.shape == (2, 2, 32)


def test_untrained_and_shallow_it_is_the_hand_template(tower_case: Any, task_of: Any) -> None:
    addon = Ivlp(depth=1, image_tokens=0)
    start = addon.start(task_of(addon))
    encoder = tower_case.encoder
    with addon.acting(encoder, start):
        features = encoder.encode_text(tower_case.tokens), encoder.encode_image(tower_case.images)
    assert torch.equal(features[0], encoder.encode_text(tower_case.tokens))
    assert torch.equal(features[1], encoder.encode_image(tower_case.images))


def test_the_towers_move_on_their_own(tower_case: Any, task_of: Any) -> None:
    addon = Ivlp(**SHORT)
    task = task_of(addon)
    with addon.training(task) as found:
        addon.objective(task, found)(torch.arange(6)).backward()
        assert found["text"].grad.abs().amax((1, 2)).min() > 0, "every layer of the text"
        assert found["image"].grad.abs().amax((1, 2)).min() > 0
        text = torch.autograd.grad(
            tower_case.encoder.encode_text(tower_case.tokens).sum(), found["image"], allow_unused=True
        )
        image = torch.autograd.grad(
            tower_case.encoder.encode_image(tower_case.images).sum(), found["text"], allow_unused=True
        )
    assert text == (None,) and image == (None,)


def test_class_weights_come_from_its_own_template(tower_case: Any) -> None:
    pipeline = Pipeline([Ivlp(**{**SHORT, "epochs": 1})]).fit(tower_case.reference, tower_case.source, "simple")
    by_default = pipeline.classifier(tower_case.reference.class_names, tower_case.source)
    other_templates = pipeline.classifier(tower_case.reference.class_names, tower_case.source, "none")
    assert torch.equal(by_default.weights[0].vectors, other_templates.weights[0].vectors)
    new = pipeline.classifier([parse_class("a striped cat"), parse_class("dog")], tower_case.source)
    assert new.weights[0].num_classes == 2, "prompts hold for other classes"
    templates: Any = Templates(templates="imagenet80").fit(tower_case.reference, tower_case.source)
    with pytest.raises(ConfigError, match="begins otherwise"):
        templates.weights(tower_case.reference.class_names, pipeline.source(tower_case.source))


def test_names_too_long_and_words_too_few(tower_case: Any, task_of: Any) -> None:
    with pytest.raises(ConfigError, match="'a photo' has 2 tokens"):
        addon = Ivlp(words="a photo", text_tokens=3)
        addon.start(task_of(addon))
    long = parse_class("a very long name of a thing that nobody has ever seen or will see some day")
    names = (*tower_case.reference.class_names[:2], long)
    with pytest.raises(ConfigError, match="class names are too long: 'a very long name"):
        Pipeline([Ivlp(**SHORT)]).fit(replace(tower_case.reference, class_names=names), tower_case.source)
    with pytest.raises(ConfigError, match="diverged"):
        Pipeline([Ivlp(**{**SHORT, "lr": 1e30})]).fit(tower_case.reference, tower_case.source)
