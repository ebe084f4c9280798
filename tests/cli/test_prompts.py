"""`vlkit eval prompts` and `vlkit adapt auto`, from folders of pictures to tables."""

import json
import os
import signal
import subprocess
import sys
import time
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
    written = (out / "prompts.md").read_text(encoding="utf-8")
    assert "new over zero-shot" in written and written.count("\n| kgcoop:epochs=2 ") == 1
    wrong = call_vlkit(*common, "--methods", "coop", "--protocol", "new-to-base")
    assert wrong.code != 0 and "base-to-new" in wrong.err


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on(pictures: Path, general_encoder: Path, call_vlkit: Any, tmp_path: Path) -> None:
    arguments = ["eval", "prompts", "--model", f"local-dir:{general_encoder}", "--data", f"tints={pictures}",
                 "--methods", "zero-shot,coop:epochs=20", "--shots", "1,2,4,8,16", "--json", "--out"]  # fmt: skip
    assert call_vlkit(*arguments, tmp_path / "whole").code == 0
    expected = cells_of(tmp_path / "whole")
    assert len(expected) == 30
    kills = 0
    for goal in (1, 7, 19):
        command = [sys.executable, "-c", "from vlkit.cli import main; main()", *arguments, str(tmp_path / "killed")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(cells_of(tmp_path / "killed")) < goal:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    done = cells_of(tmp_path / "killed")
    last = call_vlkit(*arguments, tmp_path / "killed")
    assert last.code == 0 and cells_of(tmp_path / "killed") == expected
    assert set(done) <= set(expected) and len(last.out.splitlines()) == 30


def cells_of(folder: Path) -> dict[str, Any]:
    """Hits by key; each cell once, however often the grid was killed."""
    path = folder / "prompts.jsonl"
    found: dict[str, Any] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn
        assert line["key"] not in found, "done twice"
        found[line["key"]] = line["hits"]
    return found


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


def test_active_learning_asks_in_rounds(pictures: Path, general_encoder: Path, call_vlkit: Any, tmp_path: Path) -> None:
    model, out = f"local-dir:{general_encoder}", tmp_path / "asked"
    common = ("adapt", "coop:context=2,epochs=2,lr=0.1", "--model", model, "--data", pictures, "--shots", "4")
    done = call_vlkit(*common, "--active", "3", "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    rounds = found["active"]["rounds"]
    asked = [key for one in rounds for key in one["asked"]]
    assert [one["questions"] for one in rounds] == [4, 8, 12] and len(set(asked)) == 12
    assert not set(asked) & set(found["held_out"]) and len(found["held_out"]) == 16
    assert rounds[-1]["validation"] == found["validation"]["with_addon"]
    assert found["fitted_on"]["few_shot_labels"] == "train: 12" and (out / "addon.json").is_file()
    table = call_vlkit(*common, "--active", "2", "--ask", "random", "--selective", "--out", tmp_path / "again")
    assert table.code == 0 and "questions so far" in table.out and "labels were asked for in 2 rounds" in table.err
    for options, told in (
        (("--ask", "entropy"), "belong to --active"),
        (("--active", "2", "--ask", "luck"), "clusters, random, entropy"),
    ):
        wrong = call_vlkit(*common, *options, "--out", tmp_path / "x")
        assert wrong.code != 0 and told in wrong.err
