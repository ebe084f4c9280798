"""Class and reason both right: rates by hand, with and without a fitted why_prompt, and the command."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.doubly_right import DoublyRightEvaluator
from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import Vectors
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import CachedEmbedder
from vlkit.models.embedder import Embedder

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}
REASONS = ("much of its colour.", "noise")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasons")
    with open(folder / "pictures.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "class", "caption"])
        for name, colour in COLOURS.items():
            for number in range(4):
                noise = np.random.default_rng(number).integers(0, 50, (40, 40, 3), np.uint8)
                Image.fromarray(noise + np.array(colour, np.uint8)).save(folder / f"{name}{number}.png")
                rows.writerow([f"{name}{number}.png", name, REASONS[number // 2]])
    return folder / "pictures.csv"


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    from vlkit.features.model_card import card_of
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    embedder = Embedder(build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}).eval(), "tiny")
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


def by_hand(source: CachedEmbedder, data: Any, images: torch.Tensor, k: int) -> list[float]:
    """Shares of both, class alone, reason alone, neither."""
    reasons = [one.rstrip(".") for one in REASONS]
    pairs = [(name, reason) for name in data.class_names for reason in reasons]
    texts = source.embed_texts([f"This is a photo of a {name} because there is {reason}" for name, reason in pairs])
    counts: Counter[tuple[bool, bool]] = Counter()
    for record, image in zip(data.records, images, strict=True):
        best = [pairs[place] for place in (texts @ image).argsort(descending=True)[:k].tolist()]
        votes = Counter(name for name, _ in best)
        chosen = max(votes, key=lambda name: votes[name])
        right = chosen == data.class_names[record.label]
        counts[right, (chosen, record.captions[0].rstrip(".")) in best] += 1
    return [counts[pair] / 12 for pair in ((True, True), (True, False), (False, True), (False, False))]


def test_rates_by_hand_with_and_without_a_fitted_prompt(table: Path, source: CachedEmbedder) -> None:
    data = read_source(str(table))
    records, labels = tuple(data.records), torch.tensor([record.label for record in data.records])
    found = DoublyRightEvaluator(records, data.class_names, k=3).run(source)
    expected = by_hand(source, data, source.embed_images(list(records)), 3)
    assert [found.metrics[key] for key in ("both", "only_class", "only_reason", "neither")] == pytest.approx(expected)
    assert found.metrics["accuracy@1"] == pytest.approx(expected[0] + expected[1])
    assert found.counts["reasons"] == 2 and found.counts["candidates"] == 6
    assert found.per_item is not None and found.per_item.num_rows == 12

    shots = Part("train", Vectors("image", source.embed_images(list(records))), labels, records)
    reference = Reference(class_names=tuple(map(parse_class, data.class_names)), few_shot=shots)
    fitted = Pipeline([make_addon("why_prompt:epochs=10,lr=3,batch_size=6,crop=1")]).fit(reference, source)
    images = Passes(source).read(records, fitted.edits).vectors.pooled
    prompted = DoublyRightEvaluator(records, data.class_names, k=1).run(source, fitted)
    assert prompted.metrics["both"] == pytest.approx(by_hand(source, data, images, 1)[0])
    assert not torch.allclose(images, shots.vectors.pooled, atol=1e-3)
    assert "why_prompt" in str(prompted.protocol["addons"])


def test_bad_input(table: Path, source: CachedEmbedder) -> None:
    data = read_source(str(table))
    without = [record.__class__(record.key, record.image, label=record.label) for record in data.records]
    with pytest.raises(DataError, match="12 of 12 images have no reason"):
        DoublyRightEvaluator(without, data.class_names)
    unlabelled = [record.__class__(record.key, record.image, captions=("x",)) for record in data.records]
    with pytest.raises(DataError, match="columns image, class and caption"):
        DoublyRightEvaluator(unlabelled, data.class_names)
    with pytest.raises(ConfigError, match="at least one candidate"):
        DoublyRightEvaluator(data.records, data.class_names, k=0)
    evaluator = DoublyRightEvaluator(data.records, data.class_names)
    with pytest.raises(ConfigError, match="coop: class and reason are told by cosine"):
        evaluator.run(source, Pipeline([make_addon("coop")]))
    with pytest.raises(ConfigError, match="few_shot_labels"):
        evaluator.run(source, Pipeline([make_addon("why_prompt")]))


def test_the_command_with_what_adapt_saved(table: Path, general_encoder: Path, call_vlkit: Any, tmp_path: Path) -> None:
    model = ("--model", f"local-dir:{general_encoder}", "--data", table)
    out = ("--out", tmp_path / "results.jsonl", "--json")
    plain = call_vlkit("eval", "doubly-right", *model, "-k", "2", *out)
    assert plain.code == 0, plain.err
    line = json.loads(plain.out)
    assert sum(line["metrics"][key] for key in ("both", "only_class", "only_reason", "neither")) == pytest.approx(1)
    fit = "why_prompt:epochs=1,lr=0.3,crop=1"
    done = call_vlkit("adapt", fit, *model, "--shots", "2", "--out", tmp_path / "why")
    assert done.code == 0, done.err
    adapted = call_vlkit("eval", "doubly-right", *model, "--addon", tmp_path / "why", *out)
    assert adapted.code == 0 and json.loads(adapted.out)["counts"]["candidates"] == 6
