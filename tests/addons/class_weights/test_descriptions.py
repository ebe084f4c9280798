import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.descriptions import Descriptions, described
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.saved import load_addon, save_addon
from vlkit.errors import ConfigError, DataError

CLASSES = [parse_class(name) for name in ("hen", "sea horse | hippocampus")]
TEXTS = {"Hen": ["two legs", "a red comb", "often brown"], "sea_horse": ["lives in water"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TEXTS))
    return path


def fitted(source: Any, **settings: Any) -> Pipeline:
    return Pipeline([Descriptions(**settings)]).fit(Reference(class_names=tuple(CLASSES)), source)


def test_descriptors_become_sentences_and_scores_are_averaged(tiny_source: Any, file: Path) -> None:
    source = tiny_source()
    (weights,) = fitted(source, file=str(file)).class_weights(CLASSES, source)
    image = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    prompts = ["hen, which has two legs", "hen, which is a red comb", "hen, which often brown"]
    slow = sum(float(image[0] @ source.embed_texts([prompt])[0]) for prompt in prompts) / 3
    scores = weights.scores(image)[0]  # type: ignore[arg-type]
    assert abs(float(scores[0]) - slow) < 1e-5
    assert torch.allclose(scores[1], image[0] @ source.embed_texts(["sea horse, which has lives in water"])[0])
    # What the classes are said to look like counts.
    bare = source.embed_texts(["hen"])[0]
    assert abs(float(scores[0] - image[0] @ bare)) > 1e-3


def test_sentences_are_taken_as_they_are_and_vectors_averaged(tiny_source: Any, file: Path) -> None:
    source = tiny_source()
    pipeline = fitted(source, file=str(file), form="sentences", templates="a photo of a {}.")
    (weights,) = pipeline.class_weights(CLASSES, source)
    total = sum(source.embed_texts([text])[0] for text in [*TEXTS["Hen"], "a photo of a hen."])
    assert torch.allclose(weights.vectors[0], total / total.norm(), atol=1e-5)  # type: ignore[union-attr]
    assert len(weights.vectors) == 2  # type: ignore[union-attr]
    other = fitted(source, file=str(file), form="sentences", mean="similarities").class_weights(CLASSES, source)[0]
    assert len(other.vectors) == 4  # type: ignore[union-attr]


def test_verbs_and_articles() -> None:
    assert described("hen", "has wings") == "hen, which has wings"
    assert described("hen", "used for eggs") == "hen, which is used for eggs"
    assert described("deer", "antlers") == "deer, which has antlers"


def test_texts_are_saved_with_it(tiny_source: Any, file: Path, tmp_path: Path) -> None:
    source = tiny_source()
    pipeline = fitted(source, file=str(file))
    save_addon(pipeline.addons[0], tmp_path / "saved")
    file.unlink()
    again = Pipeline([load_addon(tmp_path / "saved")])
    (one,), (two,) = (each.class_weights(CLASSES, source) for each in (pipeline, again))
    assert torch.equal(one.vectors, two.vectors)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"hen": ["two legs"]}', r"lacks 1 of 2 classes \(first: 'sea horse'\)"),
        ('{"hen": []}', "'hen' has no text"),
        ('{"hen": "two legs"}', "not followed by a list of texts"),
        ('{"hen": [1]}', "not followed by a list of texts"),
        ('["hen"]', "no object of classes"),
        ("{", "is no JSON"),
    ],
)
def test_broken_files(tiny_source: Any, file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        fitted(tiny_source(), file=str(file))


def test_a_file_that_is_not_there(tiny_source: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        fitted(tiny_source(), file=str(tmp_path / "no.json"))
    with pytest.raises(ConfigError, match="descriptions needs a file"):
        fitted(tiny_source())


def test_other_classes_than_the_file_has(tiny_source: Any, file: Path) -> None:
    source = tiny_source()
    with pytest.raises(DataError, match="'duck'"):
        fitted(source, file=str(file)).class_weights([*CLASSES, parse_class("duck")], source)
