"""The pointing game, masks and perturbations by hand and against loops, and both commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, jaccard_score

from eval.coco_instances import Box, Instance, Scene, Scenes
from eval.explanation import ExplanationEvaluator, area, largest_thing, perturbed
from eval.heat import HeatMaps, class_vectors
from eval.pointing import PointingEvaluator, highest_point
from vlkit.data.records import ImageRef, Problems, Record
from vlkit.errors import ConfigError
from vlkit.features.source import CachedEmbedder
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    torch.manual_seed(0)
    encoder = build_encoder({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}).eval()
    return CachedEmbedder(lambda: Embedder(encoder, "tiny"), None)


def heat_of(source: CachedEmbedder, scenes: Scenes, method: str) -> HeatMaps:
    return HeatMaps(source.embedder.encoder, class_vectors(source, scenes.names, "a {}"), method)


def thing(category: int, left: float, top: float, width: float, height: float) -> Instance:
    right, bottom = left + width, top + height
    shape = [[left, top, right, top, right, bottom, left, bottom]]
    return Instance(category, Box(left, top, width, height), width * height, False, shape)


@pytest.fixture
def scenes(tmp_path: Path) -> Scenes:
    made = []
    for number in range(3):
        drawn = np.random.default_rng(number).integers(0, 255, (48, 80, 3), np.uint8)
        Image.fromarray(drawn).save(tmp_path / f"{number}.png")
        things = (thing(0, 0, 0, 40, 24), thing(1, 40, 24, 20 + 5 * number, 20))
        made.append(Scene(Record(str(number), ImageRef(path=str(tmp_path / f"{number}.png"))), 48, 80, things))
    return Scenes(tuple(made), ("dog", "cat", "car"), tmp_path, Problems())


def test_the_point_lies_in_the_middle_of_the_hottest_patch() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 3] = 1
    assert highest_point(heat, 48, 80) == (70, 18)


def test_pointing_by_hand(source: CachedEmbedder, scenes: Scenes) -> None:
    # The four middle patches are equally hot; the first of them is row 1, column 1: x 30, y 18, in the dog's box and
    # 10 left of and 6 above the cat's.
    for tolerance, hits in ((0.0, 0.5), (9.9, 0.5), (10.0, 1.0)):
        evaluation = PointingEvaluator(scenes, "centre", tolerance=tolerance).run(source)
        assert evaluation.metrics["hits"] == evaluation.metrics["pointing_accuracy"] == hits
    assert evaluation.counts["pairs"] == 6 and evaluation.counts["classes"] == 2
    bare = PointingEvaluator(scenes, "centre", tolerance=0.0).run(source).metrics["chance"]
    expected = np.mean([[40 * 24 / 3840, (20 + 5 * n) * 20 / 3840] for n in range(3)])
    assert bare == pytest.approx(expected)
    with pytest.raises(ConfigError, match="No way of making heat maps is called 'legrat'"):
        PointingEvaluator(scenes, "legrat")


def test_pointing_by_patches_against_a_loop(source: CachedEmbedder, scenes: Scenes) -> None:
    evaluation = PointingEvaluator(scenes, "patches", "a {}", tolerance=0.0).run(source)
    assert evaluation.per_item is not None
    encoder, rows = source.embedder.encoder, evaluation.per_item.to_pylist()
    for scene in scenes.images:
        pixels = heat_of(source, scenes, "patches").pixels(scene.record)
        with torch.no_grad():
            patches = encoder.encode_patches(pixels[None])[0]
        for name in ("dog", "cat"):
            best = int((patches @ source.embed_texts([f"a {name}"])[0]).argmax())
            row = next(row for row in rows if row["key"] == scene.record.key and row["class"] == name)
            assert (row["x"], row["y"]) == (20 * (best % 4) + 10, 12 * (best // 4) + 6)


def test_the_largest_thing_squashed(scenes: Scenes) -> None:
    category, mask = largest_thing(scenes.images[0], 32)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:16, :16] = True
    assert category == 0 and torch.equal(mask, expected)


def test_perturbation_takes_the_hottest_patch_first() -> None:
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    heat = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    gone, back = perturbed(pixels, heat, (0.5, 0.5, 0.5))
    assert torch.equal(gone[0], pixels) and torch.equal(back[10], pixels)
    assert (gone[10] == 128).all() and (back[0] == 128).all()
    # After three tenths of four patches (1.2, so one) the upper right is gone, after five tenths the lower left too.
    assert (gone[3, :, :4, 4:] == 128).all() and torch.equal(gone[3, :, 4:], pixels[:, 4:])
    assert (gone[5, :, 4:, :4] == 128).all() and torch.equal(gone[5, :, :4, :4], pixels[:, :4, :4])
    assert torch.equal(torch.where(gone[5] == 128, back[5], gone[5]), pixels)
    assert area(torch.tensor([1.0, 0.5, 0.0])) == pytest.approx(0.5)
    assert area(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(0.25)


@pytest.mark.parametrize("method", ["patches", "decomposition", "legrad", "relevance"])
def test_against_scikit_learn_and_a_loop(source: CachedEmbedder, scenes: Scenes, method: str) -> None:
    evaluation = ExplanationEvaluator(scenes, method, "a {}").run(source)
    heat = heat_of(source, scenes, method)
    truths, given, precisions, deletions = [], [], [], []
    classes = source.embed_texts([f"a {name}" for name in scenes.names])
    for scene in scenes.images:
        category, mask = largest_thing(scene, 32)
        pixels = heat.pixels(scene.record)
        one = heat.maps(pixels, [category])
        found = torch.nn.functional.interpolate(one[None], (32, 32), mode="bilinear", align_corners=False)[0, 0]
        truths.append(mask.flatten())
        given.append((found > found.mean()).flatten())
        precisions.append(average_precision_score(mask.flatten().numpy(), found.flatten().numpy()))
        with torch.no_grad():
            gone, _ = perturbed(pixels, one[0], heat.encoder.preprocess.mean)
            scores = source.logit_scale * heat.encoder.encode_image(gone) @ classes.T
        deletions.append(area(scores.softmax(1)[:, category]))
    truth, prediction = torch.cat(truths), torch.cat(given)
    iou = jaccard_score(truth.numpy(), prediction.numpy(), average=None)
    assert evaluation.metrics["mean_iou"] == pytest.approx(np.mean(iou))
    assert evaluation.metrics["pixel_accuracy"] == pytest.approx((truth == prediction).double().mean().item())
    assert evaluation.metrics["average_precision"] == pytest.approx(np.mean(precisions), abs=1e-3)
    assert evaluation.metrics["deletion"] == pytest.approx(np.mean(deletions), abs=1e-5)
    assert 0 < evaluation.metrics["insertion"] < 1


@pytest.mark.parametrize("name", ["pointing", "explanation"])
def test_commands(
    vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any], name: str
) -> None:
    (tmp_path / "annotations").mkdir()
    document = json.loads((vlkit_data / "coco_small/annotations/instances_val2017.json").read_text())
    document["images"] = document["images"][:6]
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    called = call_vlkit(
        "eval", name, "--model", f"local-dir:{general_encoder}", "--data", tmp_path, "--images",
        vlkit_data / "coco_small" / "val2017", "--method", "legrad", "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["protocol"]["method"] == "legrad" and line["counts"]["images"] > 3
