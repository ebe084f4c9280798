"""`vlkit eval prompts` and `vlkit adapt auto`, from folders of pictures to tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlkit.cli.evaluate_prompts import split_methods

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    for label, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir()
        for number in range(22):
            noise = torch.randint(-30, 15, (3,), generator=torch.Generator().manual_seed(99 * label + number)).tolist()
            tint = tuple(min(255, max(0, c + n)) for c, n in zip(colour, noise, strict=True))
            Image.new("RGB", (64, 64), tint).save(folder / name / f"{number}.png")
    return folder


def test_methods_with_settings_are_told_apart() -> None:
    assert split_methods("zero-shot, coop:context=4,lr=0.01,kgcoop") == (
        "zero-shot",
        "coop:context=4,lr=0.01",
        "kgcoop",
    )


def test_the_grid_and_its_continuation(pictures: Path, general_encoder: Path, call_vlkit: Any, tmp_path: Path) -> None:
    model, out = f"local-dir:{general_encoder}", tmp_path / "out"
    common = ("eval", "prompts", "--model", model, "--data", f"tints={pictures}", "--seeds", "1", "--out", out)
    done = call_vlkit(*common, "--methods", "zero-shot,kgcoop:epochs=2", "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["method"] for line in lines] == ["zero-shot", "kgcoop:epochs=2"]
    assert set(lines[1]["metrics"]) == {"base", "new"} and lines[1]["cost"]["steps"] == 2
    table = call_vlkit(*common, "--methods", "zero-shot,kgcoop:epochs=2,coop:epochs=2")
    assert table.code == 0 and "harmonic mean" in table.out and "coop:epochs=2" in table.out
    assert len((out / "prompts.jsonl").read_text().splitlines()) == 3
    wrong = call_vlkit(*common, "--methods", "coop", "--protocol", "new-to-base")
    assert wrong.code != 0 and "base-to-new" in wrong.err


def test_auto_compares_and_says_why(pictures: Path, general_encoder: Path, call_vlkit: Any, tmp_path: Path) -> None:
    model, out = f"local-dir:{general_encoder}", tmp_path / "chosen"
    common = ("adapt", "auto", "--model", model, "--data", pictures, "--shots", "4", "--seed", "1")
    done = call_vlkit(*common, "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    names = [one["name"] for one in found["compared"]]
    assert names == ["zero-shot", "lp_plus_plus", "clap", "tip_adapter_f", "kgcoop"]
    assert found["method"] in names[1:] and f"{found['method']} is chosen" in found["why"]
    assert (out / "addon.json").is_file() and len(found["held_out"]) == 16
    no_val = call_vlkit("adapt", "auto", "--model", model, "--data", pictures, "--shots", "22", "--out", tmp_path / "x")
    assert no_val.code != 0 and "validation images" in no_val.err
