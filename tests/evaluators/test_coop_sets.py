"""CoOp's data sets as they lie on disk, in miniature: splits, names, templates, and the protocols over them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.base_to_new import harmonic_mean
from eval.coop_sets import PRESETS, read_coop_sets
from eval.prompt_grid import Grid, draw, run_grid
from eval.published import _BASE_TO_NEW, compare_base_to_new
from vlkit.errors import DataError
from vlkit.features.source import CachedEmbedder

WNIDS = {"n01": "tench", "n02": "crane", "n03": "crane"}


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    Image.fromarray(drawn.numpy()).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coop")
    for folder, names in (("caltech-101", ["ant_hill", "bee", "cat"]), ("dtd", ["dotted", "striped"])):
        splits: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
        for label, name in enumerate(names):
            for number, split in enumerate(["train", "train", "val", "test", "test"]):
                if split == "train" and label == 1 and number:
                    continue  # one training image, where two are asked for
                picture(root / folder / "images" / name / f"{number}.png", 10 * label + number)
                splits[split].append([f"{name}/{number}.png", label, name])
        (root / folder / f"split_zhou_{folder}.json").write_text(json.dumps(splits))
    aircraft = root / "fgvc_aircraft"
    (aircraft / "images").mkdir(parents=True)
    (aircraft / "variants.txt").write_text("707-320\nA300 B4\n")
    for place, split in enumerate(("train", "val", "test")):
        lines = [f"{place}{label} {name}" for label, name in enumerate(("707-320", "A300 B4"))]
        (aircraft / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
        for label in range(2):
            picture(aircraft / "images" / f"{place}{label}.jpg", 30 + label)
    (root / "imagenet").mkdir()
    (root / "imagenet" / "classnames.txt").write_text("".join(f"{one} {name}\n" for one, name in WNIDS.items()))
    for place, wnid in enumerate(WNIDS):
        for part in ("imagenet/images/train", "imagenet/images/val", "imagenet-sketch/images"):
            picture(root / part / wnid / f"{len(part)}_{wnid}.png", place)
        picture(root / "imagenetv2/imagenetv2-matched-frequency-format-val" / str(place) / f"v{place}.png", place)
    for wnid in ("n01", "n02"):
        picture(root / "imagenet-adversarial/imagenet-a" / wnid / "a.png", 1)
    return root


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    from vlkit.features.model_card import card_of
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    embedder = Embedder(build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}).eval(), "small")
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


def test_each_set_brings_its_split_names_and_template(root: Path) -> None:
    found = read_coop_sets(root, PRESETS["coop11-base-to-new"])
    sets = {one.name: one for one in found.sets}
    assert list(sets) == ["imagenet", "caltech101", "fgvc-aircraft", "dtd"] and "food-101" in found.missing
    assert [one.shown for one in sets["caltech101"].classes] == ["ant hill", "bee", "cat"]
    assert sets["dtd"].templates == "{} texture." and sets["caltech101"].templates == "a photo of a {}."
    assert [one.shown for one in sets["imagenet"].classes] == ["tench", "crane", "crane"]
    planes = [(one.key, one.label, one.split) for one in sets["fgvc-aircraft"].records]
    assert planes[:2] == [("00.jpg", 0, "train"), ("01.jpg", 1, "train")] and len(planes) == 6


def test_of_a_class_with_too_few_images_all_are_learned_and_validation_has_its_own_split(root: Path) -> None:
    caltech = read_coop_sets(root, PRESETS["coop11-few-shot"]).sets[1]
    drawn = draw(caltech, 2, 1)
    assert sorted(one.label or 0 for one in drawn.train) == [0, 0, 1, 2, 2]
    assert {one.split for one in drawn.val} == {"val"} and len(drawn.val) == 3
    assert {one.split for one in drawn.test} == {"test"} and len(drawn.test) == 6
    assert {one.key for one in drawn.unlabelled} == {one.key for one in caltech.records if one.split == "train"}


def test_zero_shot_under_each_sets_own_template_by_hand(root: Path, source: CachedEmbedder, tmp_path: Path) -> None:
    sets = read_coop_sets(root, PRESETS["coop11-base-to-new"]).sets
    lines = {line["data"]: line for line in run_grid(Grid(("zero-shot",), sets, seeds=(1,)), source, tmp_path)}
    dtd = next(one for one in sets if one.name == "dtd")
    for half, name in (("base", "dotted"), ("new", "striped")):  # one class each: always right
        assert lines["dtd"]["metrics"][half] == 1.0, name
    assert lines["dtd"]["protocol"]["templates"] == "{} texture." == dtd.templates
    tested = [one for one in sets[1].records if one.split == "test" and one.label in (0, 1)]
    texts = source.embed_texts(["a photo of a ant hill.", "a photo of a bee."])
    right = (source.embed_images(tested) @ texts.T).argmax(1) == torch.tensor([one.label for one in tested])
    assert lines["caltech101"]["metrics"]["base"] == pytest.approx(right.float().mean().item())


def test_shifts_are_tested_among_the_classes_they_have(root: Path, source: CachedEmbedder, tmp_path: Path) -> None:
    found = read_coop_sets(root, PRESETS["coop-domain-shift"])
    assert [one.name for one in found.sets] == ["imagenet", "imagenet-v2", "imagenet-sketch", "imagenet-a"]
    assert [len(one.classes) for one in found.sets] == [3, 3, 3, 2] and found.missing == ("imagenet-rendition",)
    assert [one.shown for one in found.sets[3].classes] == ["tench", "crane"]
    numbered = found.sets[1].records
    assert sorted((one.key.rpartition("/")[2], one.label) for one in numbered) == [
        ("v0.png", 0),
        ("v1.png", 1),
        ("v2.png", 2),
    ]
    (line,) = run_grid(Grid(("zero-shot",), found.sets, "transfer", seeds=(1,)), source, tmp_path)
    assert set(line["metrics"]) == {"imagenet", "imagenet-v2", "imagenet-sketch", "imagenet-a"}


def test_what_is_not_there_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds none of the folders of CoOp's eleven sets.*caltech-101"):
        read_coop_sets(tmp_path, PRESETS["coop11-base-to-new"])
    (tmp_path / "dtd").mkdir()
    with pytest.raises(DataError, match="imagenet is learned, and at least one other tested"):
        read_coop_sets(tmp_path, PRESETS["coop-cross-dataset"])
    (tmp_path / "dtd").rmdir()
    aircraft = tmp_path / "fgvc_aircraft"
    aircraft.mkdir()
    (aircraft / "variants.txt").write_text("707-320\n")
    for split in ("train", "val", "test"):
        (aircraft / f"images_variant_{split}.txt").write_text("1 DC-3\n")
    with pytest.raises(DataError, match=r"'1 DC-3' names no class"):
        read_coop_sets(tmp_path, PRESETS["coop11-base-to-new"])


def test_the_published_rows_average_to_the_anchor() -> None:
    means = {}
    for half in ("base", "new"):
        rows = [value for key, value in _BASE_TO_NEW.items() if key.endswith(f"/{half}")]
        assert len(rows) == 11 == len(PRESETS["coop11-base-to-new"].sets)
        means[half] = sum(rows) / 11
        assert means[half] == pytest.approx(_BASE_TO_NEW[half], abs=6e-5)
    assert harmonic_mean(means["base"], means["new"]) == pytest.approx(_BASE_TO_NEW["harmonic_mean"], abs=6e-5)
    assert {key.partition("/")[0] for key in _BASE_TO_NEW if "/" in key} == {
        one.name for one in PRESETS["coop11-base-to-new"].sets
    }
    found = compare_base_to_new("open_clip:ViT-B-16/openai", {"dtd/base": 0.5334, "new": 0.70})
    assert found["dtd/base"].within and not found["new"].within
    assert not compare_base_to_new("run:runs/mine", {"new": 0.70})


def test_they_are_listed(call_vlkit: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in map(json.loads, call_vlkit("protocols", "coop", "--json").out.splitlines())}
    assert set(PRESETS) <= set(rows) and rows["coop11-base-to-new"]["published"]
    assert rows["coop11-base-to-new"]["templates"]["eurosat"] == "a centered satellite photo of {}."
    assert "coop-domain-shift" in call_vlkit("protocols").out


def test_the_command(root: Path, general_encoder: Path, call_vlkit: Callable[..., Any], tmp_path: Path) -> None:
    common = ("eval", "prompts", "--model", f"local-dir:{general_encoder}", "--methods", "zero-shot", "--seeds", "1")
    done = call_vlkit(*common, "--protocol", "coop11-base-to-new", "--data", root, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "harmonic mean" in done.out and "left out of every mean" in done.err and "food-101" in done.err
    moved = call_vlkit(*common, "--protocol", "coop-cross-dataset", "--data", root, "--out", tmp_path / "x", "--json")
    assert moved.code == 0, moved.err
    assert set(json.loads(moved.out)["metrics"]) == {"imagenet", "caltech101", "fgvc-aircraft", "dtd"}
    wrong = call_vlkit(
        *common, "--protocol", "coop11-few-shot", "--data", root, "--data", root, "--out", tmp_path / "y"
    )
    assert wrong.code != 0 and "one --data" in wrong.err
