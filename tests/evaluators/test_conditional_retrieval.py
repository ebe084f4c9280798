"""GeneCIS against a loop, its crop by hand, its files in miniature, and the substitute's rules."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.coco_instances import Box, read_instances
from eval.conditional_retrieval import (
    ConditionalQuery,
    ConditionalRetrievalEvaluator,
    ConditionalSet,
)
from eval.conditional_sets import object_conditions, read_genecis
from eval.crops import Crop, embed_crops, genecis_corners, genecis_cut, plain_cut
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError


def crop(key: str, data: bytes = b"") -> Crop:
    return Crop(Record(key, ImageRef(data=data)))


def queries() -> ConditionalSet:
    made = [
        ConditionalQuery("1", crop("a"), "red", crop("b"), tuple(map(crop, "cdef")), "focus_object"),
        ConditionalQuery("2", crop("a"), "round", crop("c"), tuple(map(crop, "bdef")), "change_object"),
        ConditionalQuery("3", crop("g"), "red", crop("h"), tuple(map(crop, "cdbi")), "change_object"),
    ]
    return ConditionalSet(tuple(made), "by hand")


def test_against_a_loop(named_vectors: Callable[..., Any]) -> None:
    source, data = named_vectors(dim=6), queries()
    evaluation = ConditionalRetrievalEvaluator(data).run(source)
    hits: dict[str, list[float]] = {"": [], "image_only/": [], "text_only/": []}
    for query in data.queries:
        image, text = source.vector(query.reference.key), source.vector(query.condition)
        gallery = {one.key: source.vector(one.key) for one in (query.target, *query.distractors)}
        for side, asked in (("", image + text), ("image_only/", image), ("text_only/", text)):
            order = sorted(gallery, key=lambda key: -float(gallery[key] @ asked))
            hits[side].append(float(query.target.key in order[:2]))
    for side, values in hits.items():
        assert evaluation.metrics[f"{side}recall@2"] == pytest.approx(sum(values) / 3)
    per_task = [evaluation.metrics[f"{task}/recall@1"] for task in ("focus_object", "change_object")]
    assert evaluation.metrics["tasks/recall@1"] == pytest.approx(sum(per_task) / 2)
    assert evaluation.protocol["chance_recall@1"] == 0.2 and evaluation.protocol["gallery_sizes"] == {"5": 3}


def test_a_constant_scorer_finds_nothing(named_vectors: Callable[..., Any]) -> None:
    same = F.normalize(torch.ones(4), dim=0)
    source = named_vectors(dict.fromkeys([*"abcdefghi", "red", "round"], same))
    assert ConditionalRetrievalEvaluator(queries()).run(source).metrics["recall@3"] == 0


def test_a_text_alone_does_not_look_at_the_reference(named_vectors: Callable[..., Any]) -> None:
    data = queries()
    other = data._replace(queries=tuple(query._replace(reference=crop("z")) for query in data.queries))
    one, two = (ConditionalRetrievalEvaluator(each).run(named_vectors(dim=6)) for each in (data, other))
    assert one.metrics["text_only/recall@1"] == two.metrics["text_only/recall@1"]
    assert one.per_item is not None and two.per_item is not None
    assert one.per_item["rank_text_only"] == two.per_item["rank_text_only"]
    assert one.per_item["rank"] != two.per_item["rank"]


def test_genecis_crop_by_hand() -> None:
    assert genecis_corners(Box(300, 200, 100, 50), 800, 600) == (230, 165, 400, 250)
    # At the left edge context is cut off and the right side moves out of the box.
    assert genecis_corners(Box(10, 200, 100, 50), 800, 600) == (0, 165, 170, 250)
    image = Image.new("RGB", (800, 600), (255, 255, 255))
    cut = genecis_cut(image, Box(300, 200, 100, 50))
    assert cut.size == (170, 170)
    # 85 rows of photograph in the middle of 170.
    assert cut.getpixel((85, 41)) == (0, 0, 0) and cut.getpixel((85, 43)) == (255, 255, 255)
    assert plain_cut(image, Box(799.5, 10, 0.2, 0.2)).size == (1, 1)


def test_crops_are_embedded_once_and_broken_ones_named(named_vectors: Callable[..., Any]) -> None:
    stored = io.BytesIO()
    Image.new("RGB", (20, 10)).save(stored, "PNG")
    photo = Record("p", ImageRef(data=stored.getvalue()))
    crops = [Crop(photo, Box(1, 2, 3, 4)), Crop(photo, Box(1, 2, 3, 4)), Crop(photo), crop("x", b"broken"),
             Crop(Record("y", ImageRef(data=b"no image")), Box(0, 0, 1, 1))]  # fmt: skip
    source = named_vectors()
    found = embed_crops(source, crops, 8, 0, None, plain_cut)
    assert list(found.rows) == ["p@1,2,3,4", "p"] and [key for key, _ in found.unreadable] == ["y", "x"]
    assert torch.allclose(found.features[0], source.vector("p@1,2,3,4")) and source.num_images == 3


def test_genecis_files(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    for number in range(4):
        Image.new("RGB", (30, 20)).save(tmp_path / "val2017" / f"{number}.jpg")
    image = [{"filepath": f"/somewhere/{number}.jpg"} for number in range(5)]
    boxed = [{"image_id": number, "instance_bbox": [1, 2, 10, 8]} for number in range(4)]
    entry = {"reference": image[0], "condition": "dog", "target": image[1], "gallery": image[2:4]}
    rows = [entry, {**entry, "target": image[4]}, {**entry, "gallery": image[2:3]}, {**entry, "condition": "cat"}]
    (tmp_path / "focus_object.json").write_text(json.dumps(rows))
    attribute = {"reference": boxed[0], "condition": "red", "target": boxed[1], "gallery": boxed[2:]}
    (tmp_path / "change_attribute.pkl").write_bytes(pickle.dumps([attribute]))
    found = read_genecis(tmp_path, tmp_path)
    assert [query.key for query in found.queries] == ["change_attribute/0", "focus_object/0", "focus_object/3"]
    assert found.queries[0].target.box == (1, 2, 10, 8) and found.queries[1].target.box is None
    assert dict(found.left_out) == {"queries_without_image": 1, "queries_of_unusual_size": 1}
    # A pickle can run code; nothing but plain data is taken.
    (tmp_path / "focus_object.json").unlink()
    (tmp_path / "focus_object.pkl").write_bytes(pickle.dumps([{"reference": Path("x")}]))
    with pytest.raises(DataError, match="which could run code"):
        read_genecis(tmp_path, tmp_path)
    with pytest.raises(DataError, match="none of GeneCIS's files"):
        read_genecis(tmp_path / "val2017", tmp_path)


def test_substitute_and_command(
    vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    scenes = read_instances(vlkit_data / "coco_small")
    shown = {scene.record.key: {scenes.names[one.category] for one in scene.instances} for scene in scenes.images}
    made = object_conditions(scenes, num_distractors=6)
    assert len(made.queries) > 100 and made == object_conditions(scenes, num_distractors=6)
    for query in made.queries:
        own, target = shown[query.reference.key], shown[query.target.key]
        near, far = query.distractors[:3], query.distractors[3:]
        assert query.condition in target and query.reference.key not in {one.key for one in query.distractors}
        if query.task == "focus_object":
            assert query.condition in own and not any(query.condition in shown[one.key] for one in query.distractors)
            assert all(own & shown[one.key] for one in near) and not any(own & shown[one.key] for one in far)
        else:
            assert query.condition not in own and own & target
            assert all(query.condition in shown[one.key] and not own & shown[one.key] for one in near)
            assert all(query.condition not in shown[one.key] and own & shown[one.key] for one in far)
    called = call_vlkit(
        "eval", "conditional-retrieval", "--model", f"local-dir:{general_encoder}", "--data", vlkit_data / "coco_small",
        "--form", "objects", "--num-distractors", 6, "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["protocol"]["chance_recall@1"] == pytest.approx(1 / 7, abs=1e-6) and line["counts"]["tasks"] == 2
