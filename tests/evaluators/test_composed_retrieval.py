"""Composed retrieval against a loop, the file forms in miniature, and the command on real photographs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.coco_instances import read_instances
from eval.composed_retrieval import ComposedQuery, ComposedRetrievalEvaluator, ComposedSet
from eval.composed_sets import add_objects, read_cirr, read_domains, read_patterncom
from vlkit.addons.base import Fitted
from vlkit.addons.merges.freedom import FreeDom
from vlkit.addons.merges.weicom import WeiCom
from vlkit.addons.pipeline import Pipeline
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError, GalleryError

ANY_ENCODER: Any = None
FITTED = Fitted(encoder=ANY_ENCODER, logit_scale=20.0, task="retrieval")


def records(names: str) -> tuple[Record, ...]:
    return tuple(Record(name, ImageRef(data=b"")) for name in names.split())


@pytest.fixture
def composed() -> ComposedSet:
    gallery = records("a b c d e f g h i j k l")
    queries = [
        ComposedQuery("1", gallery[0], "red", ("b", "c"), ("a",), "colour", ("b", "d", "e")),
        ComposedQuery("2", gallery[1], "round", ("d",), ("b",), "shape", ("c", "d", "e")),
        ComposedQuery("3", gallery[2], "blue", ("e", "f", "g"), ("c",), "colour", ("e", "k", "l")),
    ]
    return ComposedSet(tuple(queries), gallery, "by hand")


def average_precision(order: list[str], right: tuple[str, ...]) -> float:
    hits = [place for place, key in enumerate(order, 1) if key in right]
    return sum((n + 1) / place for n, place in enumerate(hits)) / len(right)


def test_against_a_loop(composed: ComposedSet, named_vectors: Callable[..., Any]) -> None:
    source = named_vectors()
    pipeline = Pipeline([WeiCom(share=0.3, fitted=FITTED)])
    evaluation = ComposedRetrievalEvaluator(composed, ks=(1, 5)).run(source, pipeline)
    keys = [record.key for record in composed.gallery]
    gallery = torch.stack([source.vector(key) for key in keys])
    expected: dict[str, list[float]] = {"": [], "image_only/": [], "text_only/": []}
    first, subset = [], []
    for query in composed.queries:
        text, image = source.vector(query.text) @ gallery.T, source.vector(query.image.key) @ gallery.T
        merged = WeiCom(share=0.3).merge([text[None], image[None]])[0]
        for prefix, scores in (("", merged), ("image_only/", image), ("text_only/", text)):
            order = [keys[row] for row in scores.argsort(descending=True).tolist() if keys[row] not in query.ignored]
            expected[prefix].append(average_precision(order, query.right))
            if not prefix:
                first.append(float(order[0] in query.right))
                subset.append(float(next(key for key in order if key in query.subset) in query.right))
    for prefix, values in expected.items():
        assert evaluation.metrics[f"{prefix}mean_average_precision"] == pytest.approx(sum(values) / 3)
    assert evaluation.metrics["hit@1"] == pytest.approx(sum(first) / 3)
    assert evaluation.metrics["subset_hit@1"] == pytest.approx(sum(subset) / 3)
    colour = (expected[""][0] + expected[""][2]) / 2
    assert evaluation.metrics["colour/mean_average_precision"] == pytest.approx(colour)
    assert evaluation.metrics["tags/mean_average_precision"] == pytest.approx((colour + expected[""][1]) / 2)


def test_freedom_ranks_by_its_weighted_prompts(composed: ComposedSet, named_vectors: Callable[..., Any]) -> None:
    source = named_vectors()
    vocabulary = ["dog", "cat", "car", "tree", "boat"]
    vectors = torch.stack([source.vector(word) for word in vocabulary])
    merge = FreeDom(num_proxies=3, words_each=2, num_words=2, vocabulary=vocabulary, vectors=vectors, fitted=FITTED)
    evaluation = ComposedRetrievalEvaluator(composed, ks=(1,)).run(source, Pipeline([merge]))
    keys = [record.key for record in composed.gallery]
    gallery = torch.stack([source.vector(key) for key in keys])
    images = torch.stack([source.vector(query.image.key) for query in composed.queries])
    found, values = merge.inverted(images, gallery), []
    for row, query in enumerate(composed.queries):
        vector = sum(
            weight * source.vector(f"{word} {query.text}")
            for word, weight in zip(found.words[row], found.weights[row].tolist(), strict=True)
        )
        order = [keys[item] for item in (gallery @ vector).argsort(descending=True).tolist()]
        values.append(average_precision([key for key in order if key not in query.ignored], query.right))
    assert evaluation.metrics["mean_average_precision"] == pytest.approx(sum(values) / 3)


def test_equal_scores_are_chance(composed: ComposedSet, named_vectors: Callable[..., Any]) -> None:
    same = F.normalize(torch.ones(4), dim=0)
    vectors = dict.fromkeys([*"abcdefghijkl", "red", "round", "blue"], same)
    evaluation = ComposedRetrievalEvaluator(composed, ks=(1,)).run(named_vectors(vectors))
    # 11 images each; 2, 1 and 3 right ones.
    assert evaluation.metrics["hit@1"] == pytest.approx((2 + 1 + 3) / 33)


def test_bad_input_is_refused(composed: ComposedSet, named_vectors: Callable[..., Any], tiny_pipeline: Any) -> None:
    with pytest.raises(GalleryError, match="only 11 images to search"):
        ComposedRetrievalEvaluator(composed, ks=(12,)).run(named_vectors())
    lost = composed.queries[0]._replace(right=("z",))
    with pytest.raises(DataError, match=r"gallery lacks \(first: 'z'\)"):
        ComposedRetrievalEvaluator(composed._replace(queries=(lost,)))
    with pytest.raises(ConfigError, match="takes one merge"):
        ComposedRetrievalEvaluator(composed, ks=(1,)).run(named_vectors(), tiny_pipeline)
    with pytest.raises(GalleryError, match="not finite"):
        ComposedRetrievalEvaluator(composed, ks=(1,)).run(named_vectors({"red": [torch.nan, 0.0]}))


@pytest.fixture
def tiny_pipeline() -> Pipeline:
    from vlkit.addons.gallery_bias.mean import Mean

    return Pipeline([Mean()])


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_cirrs_files(tmp_path: Path) -> None:
    names = {f"dev-{n}": f"./dev/dev-{n}.png" for n in range(4)}
    for path in names.values():
        save(tmp_path / path)
    row = {
        "pairid": 12, "reference": "dev-0", "target_hard": "dev-1", "target_soft": {"dev-1": 1.0},
        "caption": "two dogs",
        "img_set": {"id": 3, "members": ["dev-0", "dev-1", "dev-2"], "reference_rank": 0, "target_rank": 1},
    }  # fmt: skip
    for name, content in (
        ("captions/cap", [row, {**row, "target_hard": "gone"}]),
        ("image_splits/split", names | {"x": "x"}),
    ):
        file = tmp_path / "cirr" / f"{name}.rc2.val.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    found = read_cirr(tmp_path)
    (query,) = found.queries
    assert (query.key, query.text, query.right, query.ignored) == ("12", "two dogs", ("dev-1",), ("dev-0",))
    assert query.subset == ("dev-1", "dev-2") and len(found.gallery) == 4 and found.left_out[0][1] == 1
    file = tmp_path / "cirr/captions/cap.rc2.val.json"
    del row["target_hard"]
    file.write_text(json.dumps([row]))
    with pytest.raises(DataError, match="no 'target_hard'; is this the split test1"):
        read_cirr(tmp_path)


def test_patterncoms_files(tmp_path: Path) -> None:
    for name in ("airplane1", "airplane2", "airplane3", "beach1", "river9"):
        save(tmp_path / "images" / "any" / f"{name}.jpg")
    (tmp_path / "PatternCom").mkdir()
    rows = [
        "airplane1.jpg,color,white",
        "airplane2.jpg,color,blue",
        "airplane3.jpg,color,blue",
        "beach1.jpg,color,blue",
    ]
    (tmp_path / "PatternCom" / "color.csv").write_text("\n".join([*rows, "gone1.jpg,color,blue"]) + "\n")
    found = read_patterncom(tmp_path)
    asked = {(query.image.key, query.text): query.right for query in found.queries}
    assert asked == {
        ("airplane1.jpg", "blue"): ("airplane2.jpg", "airplane3.jpg"),
        ("airplane2.jpg", "white"): ("airplane1.jpg",),
        ("airplane3.jpg", "white"): ("airplane1.jpg",),
    }
    assert len(found.gallery) == 5 and found.left_out[0][1] == 1 and found.queries[0].tag == "color"


def test_domain_files(tmp_path: Path) -> None:
    rows = [("real", "dog", 1), ("real", "cat", 2), ("toy", "dog", 3), ("toy", "dog", 4)]
    lines = []
    for domain, kind, number in rows:
        path = f"imagenet_r/{domain}/{kind}/{number}.jpg"
        save(tmp_path / path)
        lines.append(f"{path} {domain} {kind}")
    (tmp_path / "imagenet_r" / "full_files.csv").write_text("\n".join(lines) + "\n")
    found = read_domains(tmp_path / "imagenet_r")
    asked = {(query.image.key.rpartition("/")[2], query.text, query.tag): len(query.right) for query in found.queries}
    # The cat has no toy, so nobody asks for one; "real" is written "photo".
    assert asked == {
        ("1.jpg", "toy", "real to toy"): 2,
        ("3.jpg", "photo", "toy to real"): 1,
        ("4.jpg", "photo", "toy to real"): 1,
    }
    (tmp_path / "imagenet_r" / "full_files.csv").write_text("a real\n")
    with pytest.raises(DataError, match=r"line 1: .* is no `path domain class`"):
        read_domains(tmp_path / "imagenet_r")


def test_substitute_and_command(
    vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    scenes = read_instances(vlkit_data / "coco_small")
    shown = {scene.record.key: {scenes.names[one.category] for one in scene.instances} for scene in scenes.images}
    made = add_objects(scenes)
    assert len(made.queries) > 500
    for query in made.queries[::200]:
        other = query.text.removeprefix("with a ")
        assert other not in shown[query.image.key] and all(other in shown[key] for key in query.right)
    document = json.loads((vlkit_data / "coco_small/annotations/instances_val2017.json").read_text())
    document["images"] = document["images"][:40]
    (tmp_path / "instances_few.json").write_text(json.dumps(document))
    called = call_vlkit(
        "eval", "composed-retrieval", "--model", f"local-dir:{general_encoder}", "--data",
        tmp_path / "instances_few.json", "--images", vlkit_data / "coco_small" / "val2017", "--form", "objects",
        "--addon", "weicom:share=0.3", "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["protocol"]["merge"] == {"name": "weicom", "share": 0.3}
    assert line["metrics"]["mean_average_precision"] > 0.02
    assert call_vlkit(
        "eval", "composed-retrieval", "--model", "x", "--data", vlkit_data / "coco_small", "--form", "cir",
    ).err.startswith("vlkit: Unknown form 'cir'")  # fmt: skip
