"""Segmentation against a loop over pixels, masks against COCO's areas, and the command on real photographs."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

from eval.coco_instances import Scenes, decode_runs, read_instances
from eval.segmentation import BACKGROUND_WORDS, SegmentationEvaluator
from vlkit.data.images import read_image
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import CachedEmbedder
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    torch.manual_seed(0)
    encoder = build_encoder({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}).eval()
    return CachedEmbedder(lambda: Embedder(encoder, "tiny"), None)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two photographs: a square of cat with a small dog on it; a crowd of dogs as run lengths."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    drawn = np.random.default_rng(0).integers(0, 255, (2, 40, 56, 3), np.uint8)
    for number, pixels in enumerate(drawn):
        Image.fromarray(pixels).save(tmp_path / "val2017" / f"{number:012d}.png")
    square = [4, 4, 36, 4, 36, 36, 4, 36]
    small = [10, 10, 20, 10, 20, 20, 10, 20]
    runs = {"counts": [40 * 10, 40 * 20, 40 * 26], "size": [40, 56]}
    objects = [
        {"id": 1, "image_id": 0, "category_id": 18, "bbox": [10, 10, 10, 10], "area": 100, "segmentation": [small]},
        {"id": 2, "image_id": 0, "category_id": 17, "bbox": [4, 4, 32, 32], "area": 1024, "segmentation": [square]},
        {"id": 3, "image_id": 1, "category_id": 18, "bbox": [10, 0, 20, 40], "area": 800, "iscrowd": 1,
         "segmentation": runs},
    ]  # fmt: skip
    document = {
        "images": [{"id": n, "file_name": f"{n:012d}.png", "height": 40, "width": 56} for n in range(2)],
        "annotations": objects,
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    return tmp_path


def test_label_maps(coco: Path) -> None:
    scenes = read_instances(coco)
    first, second = (scene.label_map() for scene in scenes.images)
    # The small dog lies on the cat although it stands first in the file.
    assert first[15, 15] == 2 and first[5, 5] == 1 and first[38, 50] == 0
    assert (first == 2).sum() == 100 and (first == 1).sum() == 1024 - 100
    assert (second[:, 10:30] == 2).all() and (second == 2).sum() == 800


def test_packed_run_lengths() -> None:
    # By hand from COCO's mask code: five bits a character from '0', a sixth when more follow; from the fourth
    # run on the difference to the second last: 6, 1, 40 (8 + 32), 4 - 1, 13 - 40 (5 - 32).
    packed = "61X13UO"
    runs = [6, 1, 40, 4, 13]
    assert decode_runs({"counts": packed}, 8, 8).tolist() == decode_runs({"counts": runs}, 8, 8).tolist()
    with pytest.raises(DataError, match="do not fill 9 x 8"):
        decode_runs({"counts": runs}, 8, 9)


@pytest.mark.parametrize("background", ["ignored", "class"])
def test_mean_iou_against_torchmetrics(source: CachedEmbedder, coco: Path, background: Any, tmp_path: Path) -> None:
    scenes = read_instances(coco)
    evaluator = SegmentationEvaluator(
        scenes, ["cat | kitten", "dog"], "a {}", background, short_side=40, pictures=tmp_path / "sheets"
    )
    evaluation = evaluator.run(source)
    encoder = source.embedder.encoder
    names = [["cat", "kitten"], ["dog"], *([list(BACKGROUND_WORDS)] if background == "class" else [])]
    flat = [name for group in names for name in group]
    vectors = source.embed_texts([f"a {name}" for name in flat])
    truths, predictions = [], []
    for scene in scenes.images:
        # 40 x 56 pixels, windows of 32 at rows 0 and 8 and columns 0, 16 and 24.
        scores, count = torch.zeros(len(flat), 40, 56), torch.zeros(40, 56)
        for top, left in itertools.product((0, 8), (0, 16, 24)):
            here = (slice(top, top + 32), slice(left, left + 32))
            with torch.no_grad():
                patches = encoder.encode_patches(read_image(scene.record)[None, :, *here])[0]
            maps = (patches @ vectors.T).T.reshape(1, -1, 4, 4)
            scores[:, *here] += torch.nn.functional.interpolate(maps, (32, 32), mode="bilinear")[0]
            count[here] += 1
        scores /= count
        large = torch.nn.functional.interpolate(scores[None], (40, 56), mode="bilinear")[0]
        # Softmax keeps the order, so the class of the best name is the best class.
        owner = torch.tensor([row for row, group in enumerate(names) for _ in group])
        predictions.append(owner[large.argmax(0)].flatten())
        truth = scene.label_map().flatten() - 1
        truths.append(truth if background == "ignored" else truth.where(truth >= 0, 2))
    truth, prediction = torch.cat(truths), torch.cat(predictions)
    kept = truth >= 0
    expected = multiclass_jaccard_index(prediction[kept], truth[kept], num_classes=len(names), average="macro")
    assert evaluation.metrics["mean_iou"] == pytest.approx(expected.item(), abs=1e-6)
    accuracy = (truth == prediction)[kept].float().mean().item()
    assert evaluation.metrics["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert evaluation.counts["classes"] == evaluation.protocol["classes"] == len(names)
    low, high = evaluation.intervals["mean_iou"]
    assert 0 <= low <= high <= 1
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2


def test_everything_below_the_threshold_is_background(source: CachedEmbedder, coco: Path) -> None:
    scenes = read_instances(coco)
    evaluation = SegmentationEvaluator(scenes, None, "a {}", "class", threshold=0.999).run(source)
    # 924 + 100 + 800 of the 2 x 40 x 56 pixels are objects; all are called background.
    share = 1 - 1824 / 4480
    assert evaluation.metrics["pixel_accuracy"] == pytest.approx(share)
    assert evaluation.metrics["mean_iou"] == pytest.approx(share / 3)
    with pytest.raises(ConfigError, match="no effect while the background is ignored"):
        SegmentationEvaluator(scenes, threshold=0.5)
    with pytest.raises(ConfigError, match="1 class names for 2 categories"):
        SegmentationEvaluator(scenes, ["cat"])


def test_damaged_files_are_refused(coco: Path) -> None:
    with pytest.raises(DataError, match="holds none of COCO's"):
        read_instances(coco / "val2017")
    file = coco / "annotations" / "instances_val2017.json"
    file.write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="not of COCO's form"):
        read_instances(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="no COCO instances file"):
        read_instances(coco)


def test_masks_have_cocos_areas(vlkit_data: Path) -> None:
    scenes: Scenes = read_instances(vlkit_data / "coco_small")
    assert len(scenes.names) == 80 and len(scenes.images) > 150
    large = [(scene, one) for scene in scenes.images for one in scene.instances if one.area > 2000 and not one.crowd]
    for scene, one in large[::15]:
        assert one.mask(scene.height, scene.width).sum() == pytest.approx(one.area, rel=0.04)


def test_command(vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]) -> None:
    folder = tmp_path / "few"
    (folder / "annotations").mkdir(parents=True)
    document = json.loads((vlkit_data / "coco_small/annotations/instances_val2017.json").read_text())
    document["images"] = document["images"][:3]
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    called = call_vlkit(
        "eval", "segmentation", "--model", f"local-dir:{general_encoder}", "--data", folder,
        "--images", vlkit_data / "coco_small" / "val2017", "--templates", "photo", "--out", tmp_path / "r.jsonl",
        "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["counts"]["classes"] == 80 and 0 < line["metrics"]["mean_iou"] < 0.5


def test_add_ons_change_patches(source: CachedEmbedder, coco: Path) -> None:
    from vlkit.addons.gallery_bias.mean import Mean
    from vlkit.addons.pipeline import Pipeline
    from vlkit.addons.reference import Reference
    from vlkit.addons.towers.sclip import Sclip

    evaluator = SegmentationEvaluator(read_instances(coco), None, "a {}", short_side=40)
    plain = evaluator.run(source)
    edited = evaluator.run(source, Pipeline([Sclip()]).fit(Reference(), source))
    assert edited.protocol["edits"] == ["sclip"] and plain.protocol["edits"] == []
    assert edited.per_item is not None and plain.per_item is not None and edited.per_item != plain.per_item
    assert evaluator.run(source).per_item == plain.per_item
    with pytest.raises(ConfigError, match="Only add-ons that edit towers"):
        evaluator.run(source, Pipeline([Mean()]))
