"""Referring expressions against a loop, the views pixel by pixel, RefCOCO's files, and the command."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.coco_instances import Box, read_instances
from eval.crops import Crop
from eval.grounding import Expression, ReferringEvaluator
from eval.referring_sets import read_refcoco, unique_objects
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError

BOXES = (Box(0, 0, 10, 10), Box(10, 0, 10, 10), Box(0, 10, 12, 8))


def photo(key: str) -> Record:
    stored = io.BytesIO()
    Image.new("RGB", (24, 20), (10, 200, 30)).save(stored, "PNG")
    return Record(key, ImageRef(data=stored.getvalue()))


def test_against_a_loop(named_vectors: Callable[..., Any]) -> None:
    source = named_vectors(dim=6)
    texts = ["the dog", "the cat", "the red car", "the boat"]
    expressions = [
        Expression(text, photo("pq"[n % 2]), text, BOXES[: 2 + n % 2], n % 2) for n, text in enumerate(texts)
    ]
    for others in (0, 2, 4):
        evaluation = ReferringEvaluator(expressions, template="see {}", num_others=others).run(source)
        chosen = torch.randperm(4, generator=torch.Generator().manual_seed(0))[:others].tolist()
        expected = []
        for one in expressions:
            scores = []
            for box in one.boxes:
                view = source.vector(Crop(one.image, box).key)
                subtract = [float(view @ source.vector(f"see {texts[n]}")) for n in chosen]
                scores.append(float(view @ source.vector(f"see {one.text}")) - sum(subtract) / max(len(subtract), 1))
            expected.append(float(scores.index(max(scores)) == one.target))
        assert evaluation.metrics["accuracy"] == pytest.approx(sum(expected) / 4)
    assert evaluation.metrics["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_a_bank_of_the_expression_itself_leaves_nothing(named_vectors: Callable[..., Any]) -> None:
    one = [Expression("1", photo("p"), "the dog", BOXES, 1)]
    assert ReferringEvaluator(one, num_others=1).run(named_vectors()).metrics["accuracy"] == pytest.approx(1 / 3)


def test_drawn_views_against_the_red_circle_itself() -> None:
    from vlkit.addons.inputs.red_circle import box_scores
    from vlkit.data.resizing import Box as Rectangle
    from vlkit.features.source import CachedEmbedder
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vit = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    encoder = build_encoder({"embed_dim": 16, "vision_cfg": vit, "text_cfg": text}).eval()
    source = CachedEmbedder(lambda: Embedder(encoder, "tiny"), None)
    pixels = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    stored = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stored, "PNG")
    image, texts = Record("p", ImageRef(data=stored.getvalue())), ["a dog", "the red car", "two cats", "a boat"]
    boxes = (Box(0, 0, 20, 30), Box(30, 5, 30, 20), Box(10, 10, 40, 30))
    theirs = box_scores(
        source, pixels, [Rectangle(int(b.top), int(b.left), int(b.height), int(b.width)) for b in boxes], texts, texts
    )
    best = theirs.argmax(0).tolist()
    right = [Expression(name, image, name, boxes, target) for name, target in zip(texts, best, strict=True)]
    views = ("circle", "grey", "blur")
    assert ReferringEvaluator(right, views, num_others=4).run(source).metrics["accuracy"] == 1
    wrong = [one._replace(target=(one.target + 1) % 3) for one in right]
    assert ReferringEvaluator(wrong, views, num_others=4).run(source).metrics["accuracy"] == 0


def test_bad_input_is_refused(named_vectors: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="expected views among crop, circle"):
        ReferringEvaluator([Expression("1", photo("p"), "x", BOXES, 0)], views=("square",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'1' has 1 boxes"):
        ReferringEvaluator([Expression("1", photo("p"), "x", BOXES[:1], 0)])
    lost = [Expression("1", Record("p", ImageRef(data=b"no image")), "x", BOXES, 0)]
    with pytest.raises(DataError, match="could be read"):
        ReferringEvaluator(lost).run(named_vectors())


def test_refcocos_files(tmp_path: Path) -> None:
    objects = [
        {"id": 70 + n, "image_id": 9, "category_id": 1, "bbox": [4 * n, 2, 3, 3], "area": 9.0,
         "segmentation": [[4 * n, 2, 4 * n + 3, 2, 4 * n + 3, 5]]}
        for n in range(2)
    ]  # fmt: skip
    document = {
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "height": 8, "width": 8}],
        "annotations": objects,
        "categories": [{"id": 1, "name": "cup"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    Image.new("RGB", (8, 8)).save(tmp_path / "COCO_train2014_000000000009.jpg")
    sentences = [{"sent": "left cup", "tokens": [], "sent_id": 1}, {"sent": "the left one", "sent_id": 2}]
    row = {"ref_id": 5, "ann_id": 70, "image_id": 9, "file_name": "x", "split": "val", "sentences": sentences}
    refs = tmp_path / "refs(unc).p"
    refs.write_bytes(pickle.dumps([row, {**row, "image_id": 10}, {**row, "split": "testA"}], protocol=2))
    found, missing = read_refcoco(refs, tmp_path)
    assert [(one.key, one.text, one.target) for one in found] == [("5#0", "left cup", 0), ("5#1", "the left one", 0)]
    assert missing == 2 and found[0].boxes[1] == (4, 2, 3, 3)
    with pytest.raises(DataError, match="its splits are testA, val"):
        read_refcoco(refs, tmp_path, "testB")
    refs.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(DataError, match="could run code"):
        read_refcoco(refs, tmp_path)


def test_substitute_and_command(
    vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    made = unique_objects(read_instances(vlkit_data / "coco_small"))
    assert len(made) > 150
    for one in made:
        assert 2 <= len(one.boxes) <= 20
        if one.text.endswith((" on the left", " on the right")):
            mirrored = next(
                other for other in made
                if other.image == one.image and other.target != one.target
                and other.text.rpartition(" ")[0] == one.text.rpartition(" ")[0]
            )  # fmt: skip
            own, twin = (each.boxes[each.target] for each in (one, mirrored))
            assert (own.left + own.width / 2 < twin.left + twin.width / 2) == one.text.endswith("left")
    folder = tmp_path / "annotations"
    folder.mkdir()
    document = json.loads((vlkit_data / "coco_small/annotations/instances_val2017.json").read_text())
    document["images"] = document["images"][:12]
    (folder / "instances_val2017.json").write_text(json.dumps(document))
    called = call_vlkit(
        "eval", "referring", "--model", f"local-dir:{general_encoder}", "--data", tmp_path, "--images",
        vlkit_data / "coco_small" / "val2017", "--views", "crop,blur", "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["protocol"]["views"] == ["crop", "blur"] and 0 < line["metrics"]["chance"] < 0.5
