"""The grid of prompt learning: halves by hand, killed and continued, methods for the learned classes alone."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.prompt_grid import RESULTS, Grid, PromptSet, draw, run_grid
from eval.prompt_table import rows_of, write_table
from vlkit.addons.class_names import parse_class
from vlkit.addons.few_shot import sample_few_shot
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NAMES = ("red", "green", "blue", "grey", "black")


@cache
def source() -> CachedEmbedder:
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    embedder = Embedder(build_encoder(ARCHITECTURE).eval(), "small")
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


def pictures(folder: Path, count: int, split: str | None = None) -> list[Record]:
    records = []
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (128, 128, 128), (0, 0, 0)]
    for label, colour in enumerate(colours):
        for number in range(count):
            path = folder / f"{split}_{label}_{number}.png"
            if not path.exists():
                random = torch.Generator().manual_seed(label * 100 + number)
                noise = torch.randint(-40, 40, (3,), generator=random).tolist()
                Image.new(
                    "RGB", (16, 16), tuple(min(255, max(0, c + n)) for c, n in zip(colour, noise, strict=True))
                ).save(path)
            records.append(Record(path.stem, ImageRef(path=str(path)), label=label, split=split))
    return records


def data(folder: Path, count: int = 22) -> PromptSet:
    return PromptSet("colours", tuple(map(parse_class, NAMES)), tuple(pictures(folder, count)))


def test_zero_shot_in_both_halves_by_hand(tmp_path: Path) -> None:
    one = data(tmp_path)
    grid = Grid(("zero-shot",), (one,), seeds=(3,), templates="a {}")
    (line,) = run_grid(grid, source(), tmp_path / "out")
    drawn = draw(one, 16, 3)
    assert len(drawn.train) == 80 and len(drawn.val) == 20 and len(drawn.test) == 10
    assert not {r.key for r in drawn.test} & {r.key for r in (*drawn.train, *drawn.val)}
    for half, classes in (("base", range(3)), ("new", range(3, 5))):  # ceil(5/2)
        texts = source().embed_texts([f"a {NAMES[c]}" for c in classes])
        tested = [record for record in drawn.test if record.label in classes]
        images = source().embed_images(tested)
        right = [
            int((texts @ image).argmax()) + classes.start == r.label for image, r in zip(images, tested, strict=True)
        ]
        assert line["metrics"][half] == pytest.approx(sum(right) / len(right))
        assert line["keys"][half] == [record.key for record in tested]


def test_test_images_are_those_of_the_seed_for_all_shots(tmp_path: Path) -> None:
    one = data(tmp_path)
    few, many = draw(one, 2, 5), draw(one, 16, 5)
    assert few.test == many.test and set(few.train) < set(many.train)
    assert few.val == many.val and few.unlabelled == many.unlabelled and len(few.unlabelled) == 80
    assert not {r.key for r in few.unlabelled} & {r.key for r in (*few.val, *few.test)}
    labels = torch.tensor([record.label for record in one.records])
    assert [r.key for r in few.train] == [one.records[i].key for i in sample_few_shot(labels, 5, 2, 5, 4).train]
    split = (*pictures(tmp_path, 8, "train"), *pictures(tmp_path, 3, "test"))
    drawn = draw(replace(one, records=split), 2, 5)
    assert {record.split for record in drawn.test} == {"test"} and len(drawn.test) == 15


def test_killed_and_continued_cell_by_cell(tmp_path: Path) -> None:
    grid = Grid(("zero-shot", "coop:context=2,epochs=2"), (data(tmp_path),), shots=(1, 2), seeds=(1, 2))
    whole = list(run_grid(grid, source(), tmp_path / "whole"))
    assert len(whole) == 8 and len({line["key"] for line in whole}) == 8
    begun = run_grid(grid, source(), tmp_path / "out")
    for _ in range(3):
        next(begun)
    begun.close()
    path = tmp_path / "out" / RESULTS
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "torn')
    before = path.read_text(encoding="utf-8")
    done = list(run_grid(grid, source(), tmp_path / "out"))
    after = path.read_text(encoding="utf-8")
    assert after.startswith(before) and len(after.splitlines()) == 9  # five more, and the torn one
    assert [line["hits"] for line in done] == [line["hits"] for line in whole]
    again = [json.dumps(line) for line in run_grid(grid, source(), tmp_path / "out")]
    assert path.read_text(encoding="utf-8") == after and len(again) == 8


def test_rows_average_and_say_what_it_costs(tmp_path: Path) -> None:
    methods = (
        "zero-shot",
        "coop:context=2,epochs=2",
        "coop:context=2,per_class=true,epochs=1",
        "cocoop:epochs=1,batch_size=8",
    )
    lines = list(run_grid(Grid(methods, (data(tmp_path),), seeds=(1, 2), shots=(2,)), source(), tmp_path / "out"))
    plain, coop, probe, cocoop = rows_of(lines)
    base, new = coop.accuracy["base"], coop.accuracy["new"]
    assert base == pytest.approx(sum(line["metrics"]["base"] for line in lines if line["method"] == methods[1]) / 2)
    assert base is not None and new is not None
    assert coop.harmonic_mean == pytest.approx(2 * base * new / (base + new) if base + new else 0.0)
    low, high = coop.interval["base"] or (1, 0)
    assert low <= base <= high
    assert (plain.trained, plain.steps) == (0, 0) and (coop.trained, coop.steps) == (2 * 16, 2)
    assert probe.accuracy["new"] is None and probe.harmonic_mean is None and probe.accuracy["base"] is not None
    assert cocoop.text_for_each_image and not coop.text_for_each_image
    pairs = {one: [line for line in lines if line["method"] == methods[one]] for one in (0, 1)}
    apart = [b["metrics"]["new"] - a["metrics"]["new"] for a, b in zip(*pairs.values(), strict=True)]
    gain = coop.gain["new"]
    assert gain is not None and gain[0] == pytest.approx(sum(apart) / 2) and gain[1] <= gain[0] <= gain[2]
    assert plain.gain["new"] is None and probe.gain["new"] is None and coop.cpu_seconds > 0
    write_table(tmp_path / "table.md", "Colours", [plain, coop, probe, cocoop], "base-to-new")
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[0] == "# Colours" and len([line for line in table if line.startswith("| ")]) == 6
    assert table[2].count("|") == table[4].count("|") == 13 and "new over zero-shot" in table[2]


def test_gains_are_those_of_the_same_images() -> None:
    def line(method: str, hits: list[float]) -> dict[str, Any]:
        return {
            "method": method, "shots": 1, "seed": 1, "data": "d", "keys": {"new": list("abcd")}, "hits": {"new": hits},
            "metrics": {"new": sum(hits) / 4},
            "cost": {"train_seconds": 1.0, "train_cpu_seconds": 1.0, "steps": 1, "trained": 1, "text_seconds": 0.0,
                     "image_seconds": 0.0, "text_for_each_image": False},
        }  # fmt: skip

    before = line("zero-shot", [1.0, 0.0, 0.0, 0.0])
    _, same, better = rows_of([before, line("coop", [1.0, 0.0, 0.0, 0.0]), line("kgcoop", [1.0, 1.0, 1.0, 1.0])])
    assert same.gain["new"] == (0.0, 0.0, 0.0)  # however wide the interval of either is
    assert same.interval["new"] is not None and same.interval["new"][1] > 0.5
    assert better.gain["new"] is not None and better.gain["new"][0] == 0.75
    assert rows_of([line("coop", [1.0, 0.0, 0.0, 0.0])])[0].gain["new"] is None  # nothing to compare with


def test_transfer_tests_every_set_and_time_is_limited(tmp_path: Path) -> None:
    other = replace(data(tmp_path), name="other", classes=tuple(map(parse_class, ("a", "b", "c", "d", "e"))))
    grid = Grid(("coop:context=2",), (data(tmp_path), other), "transfer", (1,), (1,), max_seconds=1e-9)
    (line,) = run_grid(grid, source(), tmp_path / "out")
    assert set(line["metrics"]) == {"colours", "other"} and line["cost"]["steps"] == 1


def test_bad_input(tmp_path: Path) -> None:
    one = data(tmp_path, 6)
    with pytest.raises(ConfigError, match="'cop'"):
        Grid(("cop",), (one,))
    with pytest.raises(ConfigError, match="each once"):
        Grid(("coop", "coop"), (one,))
    with pytest.raises(ConfigError, match="at least one other"):
        Grid(("coop",), (one,), "transfer")
    with pytest.raises(DataError, match="too few"):
        list(run_grid(Grid(("zero-shot",), (one,)), source(), tmp_path / "out"))
    with pytest.raises(DataError, match="train and test"):
        PromptSet("x", one.classes, tuple(replace(record, split="train") for record in one.records))
