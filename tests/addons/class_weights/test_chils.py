import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.chils import Chils
from vlkit.addons.class_weights.templates import template_weights
from vlkit.addons.feature_maps.distribution_norm import DistributionNorm
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError, DataError
from vlkit.models.prompt_templates import load_templates

CLASSES = [parse_class(name) for name in ("pet", "vehicle", "tool")]
SUBS = {"pet": ["cat", "dog", "parrot"], "vehicle": ["car", "train"], "tool": ["saw"]}
SCALE = 20.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "subs.json"
    path.write_text(json.dumps(SUBS))
    return path


def fitted(source: Any, **settings: Any) -> Pipeline:
    return Pipeline([Chils(**settings)]).fit(Reference(class_names=tuple(CLASSES)), source)


def softmax(values: list[float]) -> list[float]:
    exponents = [math.exp(value) for value in values]
    return [value / sum(exponents) for value in exponents]


@pytest.mark.parametrize("reweight", [True, False])
def test_the_best_reweighted_sub_class_wins(tiny_source: Any, file: Path, reweight: bool) -> None:
    source, templates = tiny_source(), load_templates("simple")
    images = F.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    pipeline = fitted(source, file=str(file), reweight=reweight, with_class=False)
    found = pipeline.class_weights(CLASSES, source)[0].scores(images).argmax(1)  # type: ignore[arg-type]
    names = [(sub, place) for place, item in enumerate(CLASSES) for sub in SUBS[item.shown]]
    of_subs = template_weights(source, [[sub] for sub, _ in names], templates).vectors
    of_classes = template_weights(source, [item.names for item in CLASSES], templates).vectors
    for image, winner in zip(images, found.tolist(), strict=True):
        subs = softmax([SCALE * float(image @ vector) for vector in of_subs])
        supers = softmax([SCALE * float(image @ vector) for vector in of_classes])
        chances = [chance * (supers[place] if reweight else 1) for chance, (_, place) in zip(subs, names, strict=True)]
        assert names[chances.index(max(chances))][1] == winner
    plain = (images @ of_classes.T).argmax(1)
    assert (plain != found).any()  # the sub-classes count


def test_one_sub_class_which_is_the_class_equals_zero_shot(tiny_source: Any, file: Path) -> None:
    source = tiny_source()
    file.write_text(json.dumps({item.shown: [item.shown] for item in CLASSES}))
    plain = template_weights(source, [item.names for item in CLASSES], load_templates("simple"))
    (weights,) = fitted(source, file=str(file)).class_weights(CLASSES, source)
    assert torch.allclose(weights.vectors, plain.vectors, atol=1e-6)  # type: ignore[union-attr]


def test_the_class_joins_its_sub_classes_and_synonyms_count(tiny_source: Any, file: Path) -> None:
    source = tiny_source()
    classes = [parse_class("pet | animal"), *CLASSES[1:]]
    addon = fitted(source, file=str(file)).addons[0]
    assert isinstance(addon, Chils) and addon.sub_classes(classes)[0] == ["pet", "cat", "dog", "parrot"]
    weights = addon.weights(classes, source)
    assert torch.bincount(weights.class_of).tolist() == [8, 3, 2]


def test_what_cannot_be(tiny_source: Any, file: Path) -> None:
    file.write_text(json.dumps({"pet": ["cat"]}))
    with pytest.raises(DataError, match="lacks 2 of 3 classes"):
        fitted(tiny_source(), file=str(file))
    with pytest.raises(ConfigError, match="chils needs a file"):
        fitted(tiny_source())
    with pytest.raises(ConfigError, match="would change both"):
        Pipeline([Chils(), DistributionNorm()])
