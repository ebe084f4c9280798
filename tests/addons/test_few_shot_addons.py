"""What holds for every method that learns from a few labelled, or from the unlabelled test images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlkit.addons.base import AddOn
from vlkit.addons.class_names import parse_class
from vlkit.addons.few_shot import sample_few_shot
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import find_method, make_addon
from vlkit.addons.saved import load_addon, save_addon
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError
from vlkit.features.source import open_source

Blobs = Callable[..., Reference]
LABELLED = (
    "tip_adapter", "tip_adapter_f", "tip_x", "ape", "ape_t", "knn", "clip_adapter", "task_residual", "lp_plus_plus",
    "clap",
)  # fmt: skip
UNLABELLED = ("tda", "tfup", "tfup_t")


@pytest.mark.parametrize("name", [*LABELLED, *UNLABELLED])
def test_saved_and_loaded_it_answers_the_same(name: str, blobs: Blobs, tiny_source: Any, tmp_path: Path) -> None:
    source, given = tiny_source(), blobs(val=True, stream=6)
    fitted = find_method(name)().fit(given, source)
    save_addon(fitted, tmp_path / name)
    loaded = load_addon(tmp_path / name)
    assert loaded.key == fitted.key and loaded.transductive == (name in UNLABELLED)
    assert given.val is not None

    def logits(addon: AddOn) -> torch.Tensor:
        return Pipeline([addon]).classifier(given.class_names, source, "photo").logits(given.val.vectors)  # type: ignore[union-attr]

    assert torch.equal(logits(loaded), logits(fitted))


@pytest.mark.parametrize("name", LABELLED)
def test_one_image_a_class_is_enough(name: str, blobs: Blobs, tiny_source: Any) -> None:
    assert find_method(name)().fit(blobs(shots=1), tiny_source()).fitted is not None


@pytest.mark.parametrize("name", [*LABELLED, *UNLABELLED])
def test_without_its_images_it_is_refused(name: str, blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    bare = Reference(class_names=given.class_names, weights=given.weights, logits=given.logits)
    with pytest.raises(ConfigError, match="test_stream" if name in UNLABELLED else "few_shot_labels"):
        find_method(name)().fit(bare, tiny_source())


def test_what_holds_for_the_fitted_classes_alone_is_refused_for_others(blobs: Blobs, tiny_source: Any) -> None:
    source, given = tiny_source(), blobs(val=True, stream=6)
    others = [parse_class(name) for name in ("class 0", "class 1", "whale")]
    for name in (*LABELLED, *UNLABELLED):
        pipeline = Pipeline([find_method(name)().fit(given, source)])
        if name == "clip_adapter":  # it changes images, whatever the classes
            pipeline.classifier(others, source)
            continue
        with pytest.raises(ConfigError, match=r"fitted for other classes \('whale' is new\)"):
            pipeline.classifier(others, source)


def test_settings_come_from_the_command_line() -> None:
    assert make_addon("clap:strength=0.5,epochs=10").settings()["strength"] == 0.5
    assert make_addon("tip_x:gamma=none").settings()["gamma"] is None


@pytest.mark.slow
def test_a_few_images_help_on_photographs(vlkit_data: Path, general_encoder: Path) -> None:
    source = open_source(f"local-dir:{general_encoder}", device="cpu")
    found = read_source(str(vlkit_data / "caltech101"))
    chosen = [name for name in found.class_names if name != "Faces_easy"][:20]
    records = [record for record in found.records if found.class_names[record.label or 0] in chosen]
    labels = torch.tensor([chosen.index(found.class_names[record.label or 0]) for record in records])
    passes = Passes(source)
    whole = Part("all", passes.read(records).vectors, labels, tuple(records))
    names = tuple(parse_class(name.replace("_", " ")) for name in chosen)
    gains: dict[str, list[float]] = {name: [] for name in ("tip_adapter_f", "lp_plus_plus", "clap")}
    for seed in (1, 2):
        split = sample_few_shot(labels, 20, 4, seed)
        given = Reference(
            class_names=names, few_shot=whole.rows(split.train), val=whole.rows(split.val), seed=seed, passes=passes
        )
        test = whole.rows(split.rest)
        assert test.labels is not None
        plain = given.metric(PLAIN.classifier(names, source).logits(test.vectors), test.labels)
        for name, gain in gains.items():
            fitted = Pipeline([find_method(name)()]).fit(given, source).classifier(names, source)
            gain.append(given.metric(fitted.logits(test.vectors), test.labels) - plain)
    assert all(sum(gain) > 0.04 for gain in gains.values()), gains
