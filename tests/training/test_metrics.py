"""metrics.jsonl holds each step once whatever happened to the run before, and the curves are drawn from it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlkit.errors import CheckpointError
from vlkit.training.metrics import cut_back, read_metrics
from vlkit.training.summary import evaluations, most_telling, plot_curves


def write(path: Path, steps: range, tail: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps) + tail)
    return path


def test_later_steps_and_a_line_cut_short_are_removed(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", range(1, 8), tail='{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    before = path.read_text().splitlines()
    cut_back(path, 5)
    assert path.read_text().splitlines() == before[:5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    cut_back(path, 0)
    assert path.read_text() == ""


def test_a_missing_file_is_made(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "none.jsonl")) == []
    cut_back(tmp_path / "new" / "metrics.jsonl", 3)
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        cut_back(tmp_path / "file" / "metrics.jsonl", 3)


@pytest.mark.parametrize("evaluated", [False, True])
def test_curves(tmp_path: Path, evaluated: bool) -> None:
    path = write(tmp_path / "metrics.jsonl", range(1, 5))
    if evaluated:
        with path.open("a") as file:
            file.write(json.dumps({"step": 5, "loss": 0.1, "eval": {"text_to_image/recall@1": 0.5}}) + "\n")
    plot_curves(path, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        # A second panel for the evaluations.
        assert (picture.height > picture.width * 0.8) is evaluated
        assert picture.convert("L").getextrema() == (0, 255)


def test_many_metrics_leave_room_for_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", range(1, 5))
    groups = ("text_to_image", "image_to_text", "probe", "segmentation/of_a_long_name")
    found = {f"{group}/recall@{k}": k / 99 for group in groups for k in range(1, 21)}
    with path.open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 0.1, "eval": found}) + "\n")
    plot_curves(path, tmp_path / "loss.png")
    curves = most_telling(evaluations(list(read_metrics(path))))
    assert len(curves) == 10
    # Of each evaluation the first ones, in their order.
    assert [name for name in curves if name.startswith("probe")] == [f"probe/recall@{k}" for k in (1, 2)]
    assert [name for name in curves if name.startswith("text")] == [f"text_to_image/recall@{k}" for k in (1, 2, 3)]
