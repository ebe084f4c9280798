from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.semap import SeMap
from vlkit.addons.class_weights.templates import template_weights
from vlkit.addons.exchange import Vectors
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.errors import CheckpointError, ConfigError

SOURCES = ("tabby cat", "police dog", "sports car", "steam train", "pine tree", "rose")
CLASSES = tuple(parse_class(name) for name in ("cat", "dog", "car"))


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "names.txt").write_text("\n".join(SOURCES) + "\n")
    head = {"weight": torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), "bias": torch.arange(6.0)}
    save_file(head, tmp_path / "head.safetensors")
    return {"names": str(tmp_path / "names.txt"), "head": str(tmp_path / "head.safetensors")}


def fitted(source: Any, classes: Any = CLASSES, few_shot: Part | None = None, **settings: Any) -> Pipeline:
    return Pipeline([SeMap(**settings)]).fit(Reference(class_names=tuple(classes), few_shot=few_shot), source)


def logits_of(head: str, images: torch.Tensor) -> torch.Tensor:
    from safetensors.torch import load_file

    found = load_file(head)
    return images @ found["weight"].T + found["bias"]


def test_logits_of_a_head_are_mixed_by_what_names_mean(tiny_source: Any, files: dict[str, Any]) -> None:
    source, images = tiny_source(), unit(5)
    found = fitted(source, k=2, **files).classifier(CLASSES, source).logits(Vectors("image", images))
    outputs = logits_of(files["head"], images)
    names = [source.embed_texts([f"a photo of a {name}."])[0] for name in SOURCES]
    for place, item in enumerate(CLASSES):
        target = source.embed_texts([f"a photo of a {item.shown}."])[0]
        likeness = [float(target @ name) for name in names]
        best = sorted(range(6), key=lambda one: -likeness[one])[:2]
        share = torch.softmax(torch.tensor([likeness[one] for one in best]) / 0.05, 0)
        slow = sum(part * outputs[:, one] for part, one in zip(share, best, strict=True))
        assert torch.allclose(found[:, place], slow, atol=1e-4)
    # Meaning counts: the control scores otherwise.
    control = fitted(source, mapping="random", **files).classifier(CLASSES, source).logits(Vectors("image", images))
    assert not torch.allclose(control, found, atol=1e-2)


def test_equal_lists_give_the_model_itself_and_order_does_not_count(
    tiny_source: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    source, images = tiny_source(), Vectors("image", unit(5))
    same = [parse_class(name) for name in SOURCES]
    for settings in ({"mapping": "one"}, {"mapping": "many", "k": 1}):
        found = fitted(source, same, **files, **settings).classifier(same, source).logits(images)
        assert torch.allclose(found, logits_of(files["head"], images.pooled), atol=1e-4)
    from safetensors.torch import load_file

    order, head = [3, 1, 5, 0, 2, 4], load_file(files["head"])
    before = fitted(source, **files).classifier(CLASSES, source).logits(images)
    (tmp_path / "names.txt").write_text("\n".join(SOURCES[one] for one in order))
    save_file({name: tensor[order].contiguous() for name, tensor in head.items()}, files["head"])
    assert torch.allclose(fitted(source, **files).classifier(CLASSES, source).logits(images), before, atol=1e-5)


def test_without_a_head_the_names_themselves_are_the_model(tiny_source: Any, files: dict[str, Any]) -> None:
    source = tiny_source()
    addon = fitted(source, names=files["names"], mapping="one").addons[0]
    assert isinstance(addon, SeMap)
    theirs = template_weights(source, [(name,) for name in SOURCES], ("a photo of a {}.",)).vectors
    places = addon.table(CLASSES, source).argmax(1)
    assert len(places.unique()) == 3 and torch.equal(addon.weights(CLASSES, source).vectors, theirs[places])


def test_frequency_counts_what_the_model_says_of_images(tiny_source: Any, files: dict[str, Any]) -> None:
    source = tiny_source()
    images = torch.cat([unit(40, 2), unit(40, 3)])
    said = logits_of(files["head"], images).argmax(1)
    wanted = said.unique()[[2, 0, 1]]
    rows = torch.tensor([int((said == one).nonzero()[0]) for one in wanted])
    shots = Part("train", Vectors("image", images[rows]), torch.arange(3))
    addon = fitted(source, CLASSES, shots, mapping="frequency", **files).addons[0]
    assert isinstance(addon, SeMap)
    assert torch.equal(addon.table(CLASSES, source).argmax(1), wanted)
    with pytest.raises(ConfigError, match="holds for the classes it was fitted for"):
        addon.weights(CLASSES[::-1], source)
    with pytest.raises(ConfigError, match="needs few_shot_labels"):
        fitted(source, mapping="frequency", **files)


def test_what_cannot_be(tiny_source: Any, files: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_source()
    with pytest.raises(ConfigError, match="semap needs the names"):
        fitted(source)
    with pytest.raises(ConfigError, match="cannot read the names"):
        fitted(source, names=str(tmp_path / "none.txt"))
    with pytest.raises(CheckpointError, match="cannot read the head"):
        fitted(source, names=files["names"], head=str(tmp_path / "none.safetensors"))
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(CheckpointError, match=r"expected weight \(2, 16\)"):
        fitted(source, **files)
    pipeline = fitted(source, names=files["names"], mapping="one")
    with pytest.raises(ConfigError, match="3 classes cannot each have a source"):
        pipeline.class_weights(CLASSES, source)
    with pytest.raises(ConfigError, match="k = 0"):
        fitted(source, k=0, **files)
