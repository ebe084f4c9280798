"""What a run's data give: mixtures in a run file, the lines of data.jsonl, quarantine.jsonl, and resuming."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlkit.config import RunConfig, load_run, remarks
from vlkit.errors import CheckpointError, ConfigError
from vlkit.training.plan import dry_run
from vlkit.training.pretrain import pretrain


def files_of(count: int, broken: int | None = None) -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(count)
    for number in range(count):
        picture = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(picture, "PNG")
        about = {"caption": f"short {number}", "long": "One thing. " * 9, "kind": str(number % 2)}
        yield f"{number:06}.png", picture.getvalue() if number != broken else b"rubbish"
        yield f"{number:06}.json", json.dumps(about).encode()


@pytest.fixture
def make_run(tmp_path: Path, write_tar: Callable[..., Path]) -> Callable[..., RunConfig]:
    first = write_tar(tmp_path / "a" / "00000.tar", files_of(16, broken=3)).parent
    second = write_tar(tmp_path / "b" / "00000.tar", files_of(8)).parent

    def make(*overrides: str) -> RunConfig:
        vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
        text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        run: dict[str, Any] = {
            "run": {"out": str(tmp_path / "out"), "steps": 8, "device": "cpu"},
            "model": {"architecture": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}},
            "data": {
                "train": {str(first): 1.0, str(second): 1.0},
                "global_batch_size": 6,
                "workers": 0,
                "max_bad_fraction": 0.5,
                "captions": {"fields": {"caption": 1.0, "long": 1.0}},
            },
            "checkpoint": {"every": "3 steps"},
        }
        return load_run(run, overrides)

    return make


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_mixture_from_a_run_file_to_its_counts(make_run: Callable[..., RunConfig]) -> None:
    plan = dry_run(make_run())
    assert [(group.share, group.planned) for group in plan.data.groups] == [(0.5, 12), (0.5, 12)]
    assert plan.data.remainder == "none: every batch is full" and plan.steps_per_epoch == 4
    said: list[str] = []
    asked = iter(range(1, 99))
    out = pretrain(make_run(), say=said.append, stop=lambda: next(asked) == 6)
    pretrain(make_run(), resume=True, say=said.append)
    found = lines(out / "data.jsonl")
    assert [line["step"] for line in found] == [4, 8]
    last = found[-1]
    assert [(source["expected"], source["realised"]) for source in last["sources"]] == [(24, 24), (24, 24)]
    assert last["broken"] == 1 and last["causes"] == {"not an image": 1}
    assert last["cut_texts"] > 0 and found[0]["texts"] == 24
    (broken,) = lines(out / "quarantine.jsonl")  # once, though the image came in both parts of the run
    assert broken["key"] == "00000/000003" and broken["cause"] == "not an image" and broken["message"]
    assert any("1 sample could not be read and left out (1 x not an image)" in line for line in said)
    assert any("24 samples given, 24.0 expected" in line for line in said)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("data.samples_per_epoch=30", "order.samples_per_epoch: 24 -> 30"),
        ("data.replacement=true", "order.replacement: false -> true"),
        ("data.captions.sub_captions=2", "captions.sub_captions: null -> 2"),
    ],
)
def test_another_order_is_not_continued(make_run: Callable[..., RunConfig], override: str, difference: str) -> None:
    pretrain(make_run("run.steps=3"), say=lambda line: None)
    with pytest.raises(CheckpointError, match="belongs to another run") as raised:
        pretrain(make_run(override), resume=True, say=lambda line: None)
    assert f"\n  {difference}\n" in str(raised.value)
    run = make_run()
    weights = dict.fromkeys(run.data.train, 1.0) | {next(iter(run.data.train)): 3.0}
    changed = run.model_copy(update={"data": run.data.model_copy(update={"train": weights})})
    with pytest.raises(CheckpointError, match=r"order\.sources\.0\.share: 0\.5 -> 0\.75"):
        pretrain(changed, resume=True, say=lambda line: None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train={}", "data.train: expected a path, a list of paths, or a table of paths with"),
        ('data.train={"a" = 0}', "expected a weight above 0 for each source; 'a' has 0"),
        ("data.captions.templates=simple", "templates take the place of captions"),
        ("data.captions.class_field=kind", "class_field is for templates, which are not given"),
    ],
)
def test_settings_that_make_no_sense(make_run: Callable[..., RunConfig], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_run(override)
    assert message in str(raised.value)


def test_a_remainder_without_effect_is_said(make_run: Callable[..., RunConfig]) -> None:
    assert remarks(make_run()) == []
    (line,) = remarks(make_run("data.remainder=keep"))
    assert line == "data.remainder has no effect: with this kind of sampling every batch is full."
