"""Published rows: whole, and run as the evaluators would run them by hand; pictures of labels are read as they lie."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.anchors import ANCHORS, find_anchor, run_anchor
from eval.label_folders import read_label_folder
from eval.retrieval import RetrievalEvaluator
from eval.segmentation import SegmentationEvaluator, mean_iou_difference
from vlkit.addons.adapt import captioned_reference
from vlkit.addons.feature_maps.distribution_norm import DistributionNorm
from vlkit.addons.pair_scores.pacl import Pacl
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.registry import make_addon
from vlkit.addons.towers.clearclip import ClearClip
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder
from vlkit.models.embedder import Embedder
from vlkit.models.heads.patch_alignment import PatchAlignment
from vlkit.models.open_clip_encoder import build_encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 16}


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    torch.manual_seed(0)
    model = Embedder(build_encoder({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}).eval(), "tiny")
    return CachedEmbedder(lambda: model, None, card_of(model))


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((48, 40)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs` in Karpathy's form, `classes` in train and val folders, `labels` with pictures of labels."""
    folder = tmp_path_factory.mktemp("anchors")
    entries = []
    (folder / "pairs" / "images").mkdir(parents=True)
    for number in range(18):
        (folder / "pairs" / "images" / f"{number}.png").write_bytes(picture(number))
        split = "test" if number < 6 else "train"
        sentences = [{"raw": f"thing {number} seen {way}", "tokens": []} for way in ("here", "there")]
        entries.append({"filename": f"{number}.png", "split": split, "imgid": number, "sentences": sentences})
    (folder / "pairs" / "dataset_pairs.json").write_text(json.dumps({"dataset": "pairs", "images": entries}))
    for split in ("train", "val"):
        for row, name in enumerate(("cat", "sea_horse")):
            (folder / "classes" / split / name).mkdir(parents=True)
            for number in range(4):
                path = folder / "classes" / split / name / f"{number}.png"
                path.write_bytes(picture(10 * row + number + 100 * (split == "val")))
    labels = np.zeros((40, 48), np.uint8)
    labels[:20, :24], labels[20:, 24:], labels[:5] = 1, 2, 255
    for part in ("images", "labels"):
        (folder / "labels" / part).mkdir(parents=True)
    (folder / "labels" / "images" / "one.png").write_bytes(picture(7))
    Image.fromarray(labels).save(folder / "labels" / "labels" / "one.png")
    (folder / "labels" / "names.txt").write_text("background\ncat | kitten\ndog\n")
    return folder


def test_every_row_can_be_made_and_names_a_metric() -> None:
    assert len(ANCHORS) == 12 + 12 + 11 + 16
    for name, row in ANCHORS.items():
        assert row.name == name and row.published and all(0 < value < 1 for value in row.published.values())
        addons = Pipeline([make_addon(text) for text in row.addons])
        assert bool(addons.addons) == ("plain" not in name)
        assert 0 < row.tolerance <= 0.03 and row.open_points
    flickr = find_anchor("dn/flickr-tta-0.25")
    assert flickr.published["text_to_image/recall@1"] == 0.676 and flickr.addons == (
        "tta",
        "distribution_norm:lam=0.25",
    )
    assert find_anchor("hubness/coco-nnn-text").published == {"text_to_image/recall@1": 0.3753}
    assert find_anchor("dense/clearclip-voc20").published == {"mean_iou": 0.809}
    with pytest.raises(ConfigError, match=r"dn/flickr-0\.5"):
        find_anchor("dn/flickr0.5")


def test_retrieval_as_by_hand(source: CachedEmbedder, root: Path) -> None:
    published = {"text_to_image/recall@1": 0.5, "image_to_text/recall@5": 0.4}
    row = replace(find_anchor("dn/flickr-0.25"), folder="pairs", num_images=0, published=published)
    row = replace(row, addons=("distribution_norm:lam=0.25,bank_size=12",))
    found = run_anchor(row, root, source)
    records = read_source(str(root / "pairs")).records
    passes, prefix = Passes(source), "A photo depicts "
    train, test = ([one for one in records if one.split == split] for split in ("train", "test"))
    reference, _ = captioned_reference(passes, train, text_prefix=prefix)
    pipeline = Pipeline([DistributionNorm(lam=0.25, bank_size=12)]).fit(reference, source)
    expected = RetrievalEvaluator(test, passes=passes, text_prefix=prefix).run(source, pipeline).metrics
    for metric, value in published.items():
        assert found[metric].difference == pytest.approx(expected[metric] - value)
        assert found[metric].within is (abs(expected[metric] - value) <= row.tolerance)
    plain = run_anchor(replace(row, addons=(), text_prefix=""), root, source)
    assert plain != found
    with pytest.raises(DataError, match=r"gives 6 images; dn/flickr-0.25 was measured on 1000"):
        run_anchor(replace(row, num_images=1000), root, source)
    with pytest.raises(DataError, match="is not there"):
        run_anchor(find_anchor("dn/flickr-0.25"), root, source)


def test_classification_takes_its_bank_from_the_training_images(source: CachedEmbedder, root: Path) -> None:
    row = replace(find_anchor("dn/imagenet-0.5"), folder="classes", num_images=8, bank_images=8)
    row = replace(row, addons=("distribution_norm:bank_size=8",))
    found = run_anchor(row, root, source)["accuracy@1"]
    assert 0 <= found.published + found.difference <= 1
    with pytest.raises(DataError, match="A bank of 8 unlabelled images was asked for, but the reference holds 3"):
        run_anchor(replace(row, bank_images=3), root, source)


def test_segmentation_of_pictures_of_labels(source: CachedEmbedder, root: Path) -> None:
    scenes = read_label_folder(root / "labels")
    assert scenes.names == ("cat | kitten", "dog")
    found = scenes.images[0].label_map()
    assert [int((found == value).sum()) for value in (-1, 0, 1, 2)] == [240, 40 * 48 - 240 - 360 - 480, 360, 480]
    things = SegmentationEvaluator(scenes).run(source)
    everything = SegmentationEvaluator(scenes, background="class").run(source)
    assert sum(things.per_item.column("pixels").to_pylist()) == 840  # type: ignore[union-attr]
    assert sum(everything.per_item.column("pixels").to_pylist()) == 40 * 48 - 240  # type: ignore[union-attr]
    row = replace(find_anchor("dense/clearclip-voc20"), folder="labels")
    value = run_anchor(row, root, source)["mean_iou"]
    pipeline = Pipeline([ClearClip()]).fit(Reference(), source)
    expected = SegmentationEvaluator(scenes, logit_scale=50.0).run(source, pipeline).metrics["mean_iou"]
    assert value.published + value.difference == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda place: (place / "names.txt").unlink(), "names.txt"),
        (lambda place: (place / "names.txt").write_text("background\n"), "names no class"),
        (lambda place: (place / "names.txt").write_text("background\ncat\n"), "has the label 2; the names have 1"),
        (lambda place: Image.new("L", (8, 8)).save(place / "labels" / "one.png"), "8 x 8 pixels"),
        (lambda place: Image.new("RGB", (48, 40)).save(place / "labels" / "one.png"), "has mode RGB"),
        (lambda place: (place / "labels" / "one.png").write_text("x"), "Cannot read the labels"),
        (lambda place: (place / "labels" / "one.png").unlink(), "has no photograph"),
    ],
)
def test_label_folders_that_are_none(root: Path, tmp_path: Path, change: Callable[[Path], Any], says: str) -> None:
    import shutil

    place = tmp_path / "labels"
    shutil.copytree(root / "labels", place)
    change(place)
    with pytest.raises(DataError, match=says):
        read_label_folder(place).images[0].label_map()


def test_a_head_of_patches_segments_too(source: CachedEmbedder, root: Path) -> None:
    scenes, torch_state = read_label_folder(root / "labels"), torch.random.get_rng_state()
    head = PatchAlignment(64, 16)
    torch.random.set_rng_state(torch_state)
    addon = Pacl()._with(head)
    pipeline = Pipeline([addon.fit(Reference(), source) if addon.head else addon])
    plain, found = SegmentationEvaluator(scenes).run(source), SegmentationEvaluator(scenes).run(source, pipeline)
    assert found.protocol["edits"] == ["pacl"] and found.metrics != plain.metrics
    change, low, high = mean_iou_difference(plain, found)
    assert change == pytest.approx(found.metrics["mean_iou"] - plain.metrics["mean_iou"])
    assert low == pytest.approx(change) and high == pytest.approx(change), "one photograph is drawn whatever is drawn"
    with pytest.raises(ValueError, match="photographs and classes"):
        mean_iou_difference(plain, SegmentationEvaluator(scenes, background="class").run(source))


def test_the_command(call_vlkit: Any, root: Path, general_encoder: Path) -> None:
    listed = call_vlkit("eval", "anchors", "dense/clearclip", "--list", "--json")
    assert len(listed.out.splitlines()) == 8 and json.loads(listed.out.splitlines()[0])["addons"] == ["clearclip"]
    assert "clearclip" in call_vlkit("eval", "anchors", "dense", "--list").out
    assert "Name rows and --data" in call_vlkit("eval", "anchors").err
    assert "No published row is called" in call_vlkit("eval", "anchors", "dn/flikr", "--data", root).err
    model = ("--model", f"local-dir:{general_encoder}", "--no-cache", "--json")
    place = root.parent / "voc"
    place.mkdir(exist_ok=True)
    (place / "voc20").symlink_to(root / "labels")
    found = call_vlkit("eval", "anchors", "dense/maskclip-voc20", "--data", place, *model)
    line = json.loads(found.out)
    assert line["metric"] == "mean_iou" and line["published"] == 0.749 and line["within"] is False
