from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.mean_of_similarities import MeanOfSimilarities
from vlkit.addons.class_weights.templates import template_weights
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError
from vlkit.models.prompt_templates import load_templates

CLASSES = [parse_class(name) for name in ("cat", "sea horse", "dog | puppy")]


def test_a_class_scores_the_mean_over_its_prompts(tiny_source: Any) -> None:
    source, templates = tiny_source(), load_templates("simple")
    pipeline = Pipeline([MeanOfSimilarities("simple")]).fit(Reference(class_names=tuple(CLASSES)), source)
    (weights,) = pipeline.class_weights(CLASSES, source)
    images = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    for image, found in zip(images, weights.scores(images), strict=True):  # type: ignore[arg-type]
        for place, item in enumerate(CLASSES):
            texts = [template.replace("{}", name) for name in item.names for template in templates]
            slow = sum(float(image @ source.embed_texts([text])[0]) for text in texts) / len(texts)
            assert abs(float(found[place]) - slow) < 1e-5


def test_beside_the_mean_of_features_a_factor_a_class_is_missing(tiny_source: Any) -> None:
    source, templates = tiny_source(), load_templates("simple")
    images = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    for item in CLASSES[:2]:  # one name each
        mean = source.embed_texts([template.replace("{}", item.shown) for template in templates]).mean(0)
        ours = MeanOfSimilarities("simple").weights([item], source).scores(images)
        theirs = template_weights(source, [item.names], templates).scores(images)
        assert torch.allclose(ours, mean.norm() * theirs, atol=1e-5)
        assert mean.norm() < 0.99  # so that both differ


def test_an_unknown_set_is_refused(tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match="simpel"):
        MeanOfSimilarities("simpel").fit(Reference(class_names=tuple(CLASSES)), tiny_source())
