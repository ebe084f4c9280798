"""Evaluations from [[eval]] sections: the same numbers as outside training, images read once."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.in_training import make_every
from eval.retrieval import RetrievalEvaluator
from vlkit.config import RunConfig, load_run
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.settings import Duration
from vlkit.training.loop import Every, Moment

ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
WORDS = ("dog", "cat", "ball", "grass", "street", "river")


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    torch.manual_seed(0)
    return build_encoder(ARCHITECTURE).eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six photographs with a caption each in a table, in two class folders."""
    rows = ["image,caption"]
    for number, word in enumerate(WORDS):
        path = tmp_path / "photos" / ("dark_one" if number % 2 else "light") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((20, 24)).save(path)
        rows.append(f"{path.relative_to(tmp_path)},a {word}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path


def run_with(*sections: dict[str, Any]) -> RunConfig:
    run = {"run": {"out": "out", "steps": 1}, "model": {"name": "ViT-B-32"}, "data": {"train": "train"}}
    return load_run({**run, "eval": list(sections)})


def moment(encoder: DualEncoder) -> Moment:
    numbers = {field.name: 1 for field in dataclasses.fields(Moment)}
    return Moment(**{**numbers, "parts": {}, "watched": {}, "metrics": {}, "stopping": False, "encoder": encoder})


def call(entry: Every, encoder: DualEncoder) -> dict[str, float]:
    return dict(entry.action(moment(encoder)) or {})


def test_the_numbers_are_those_of_the_evaluator(data: Path, encoder: DualEncoder) -> None:
    section = {"name": "retrieval", "data": str(data / "table.csv"), "every": "5 steps"}
    (entry,) = make_every(run_with(section))
    assert entry.when == Duration(5, "steps")
    evaluator = RetrievalEvaluator(read_source(data / "table.csv").records)
    expected = dict(evaluator.run(Embedder(encoder, "same")).metrics)
    measured = call(entry, encoder)
    assert {key: expected[key] for key in measured} == measured
    assert set(expected) - set(measured) == {"image_to_text/median_rank", "text_to_image/median_rank"}


def test_images_are_read_once_and_the_weights_each_time(data: Path, encoder: DualEncoder) -> None:
    (entry,) = make_every(run_with({"name": "classification", "data": str(data / "photos")}))
    first = call(entry, encoder)
    assert set(first) == {"accuracy@1", "mean_per_class_recall"}
    for path in data.glob("photos/*/*.png"):
        path.unlink()
    assert call(entry, encoder) == first
    torch.manual_seed(1)
    accuracies = {call(entry, build_encoder(ARCHITECTURE).eval())["accuracy@1"] for _ in range(6)}
    assert len(accuracies) > 1


def test_two_sections_of_one_kind_are_told_apart(data: Path, encoder: DualEncoder) -> None:
    (data / "other.csv").write_text((data / "table.csv").read_text())
    sections = [{"name": "retrieval", "data": str(data / f"{stem}.csv")} for stem in ("table", "other")]
    first, second = (call(entry, encoder) for entry in make_every(run_with(*sections)))
    assert "table/text_to_image/recall@1" in first and "other/text_to_image/recall@1" in second
    assert list(first.values()) == list(second.values())


def test_unreadable_images_are_said_once(data: Path, encoder: DualEncoder, caplog: pytest.LogCaptureFixture) -> None:
    (data / "photos" / "light" / "0.png").write_bytes(b"no image")
    (entry,) = make_every(run_with({"name": "retrieval", "data": str(data / "table.csv")}))
    for _ in range(2):
        assert call(entry, encoder)["text_to_image/recall@10"] == 1.0
    (message,) = caplog.messages
    assert message.startswith("1 evaluation images cannot be read (first: photos/light/0.png")


def test_missing_data_is_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        make_every(run_with({"name": "retrieval", "data": str(tmp_path / "none")}))


def test_a_protocol_gives_the_numbers_it_gives_outside(encoder: DualEncoder, tmp_path: Path) -> None:
    from eval.protocol_data import prepare
    from eval.protocols import PROTOCOLS

    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for number, name in enumerate(names * 2):
        path = tmp_path / "cifar10" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((20, 24)).save(path)
    section = {"protocol": "cifar10-18", "data": str(tmp_path / "cifar10"), "every": "1 steps"}
    (every,) = make_every(run_with(section))
    expected = prepare(PROTOCOLS["cifar10-18"], tmp_path / "cifar10").run(Embedder(encoder=encoder, name="x")).metrics
    assert every.action(moment(encoder)) == pytest.approx(dict(expected), abs=1e-6)
    for wrong in ({"data": "x"}, {**section, "name": "retrieval"}, {**section, "split": "test"}):
        with pytest.raises(ConfigError):
            run_with(wrong)
    with pytest.raises(ConfigError, match="Unknown protocol 'cifar10'"):
        make_every(run_with({**section, "protocol": "cifar10"}))
