"""`vlkit classify` on tiny real files: what it prints, writes and refuses."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.models.load import pick_precision
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return f"local-dir:{save_encoder(build_encoder(ARCHITECTURE), tmp_path_factory.mktemp('model') / 'model')}"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("a.jpg", "red"), ("b.png", "blue"), ("=c.jpg", "green")):
        Image.new("RGB", (40, 30), color).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 this is no image")
    return folder


def test_json_lines_and_unreadable_images(call_vlkit, model, photos):
    called = call_vlkit("classify", photos, "--model", model, "--classes", "dog,cat | kitten", "--json", "--top", 2)
    assert called.code == 0, called.err
    lines = [json.loads(line) for line in called.out.splitlines()]
    assert [line["path"].rsplit("/", 1)[1] for line in lines] == ["=c.jpg", "a.jpg", "b.png", "broken.jpg"]
    for line in lines[:3]:
        assert {item["name"] for item in line["classes"]} == {"dog", "cat"}
        assert sum(item["probability"] for item in line["classes"]) == pytest.approx(1, abs=1e-5)
        assert line["probability"].startswith("softmax(") and line["unsure"] is False
    assert "error" in lines[3]
    assert "unreadable images: 1" in called.err and "broken.jpg" in called.err


def test_csv_sorting_report_and_threshold(call_vlkit, model, photos, tmp_path):
    table, report, out = tmp_path / "t.csv", tmp_path / "r.html", tmp_path / "sorted"
    called = call_vlkit(
        "classify", photos, "--model", model, "--classes", "dog,cat", "--min-probability", 1,
        "--csv", table, "--report", report, "--sort-into", out, "--link",
    )  # fmt: skip
    assert called.code == 0, called.err
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["unsure"] for row in rows] == ["yes", "yes", "yes", ""]
    assert len(list((out / "unsure").iterdir())) == 3 and (out / "unsure/a.jpg").is_symlink()
    assert "unsure" in report.read_text() and "unsure" in called.out


def test_csv_cells_cannot_be_formulas(call_vlkit, model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    table = tmp_path / "t.csv"
    assert call_vlkit("classify", "=c.jpg", "--model", model, "--classes", "@sum,+1", "--csv", table).code == 0
    row = list(csv.reader(table.read_text().splitlines()))[1]
    assert row[0] == "'=c.jpg" and {row[3], row[5]} == {"'@sum", "'+1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", ""], "There is no class"),
        (["--classes", "dog,Dog"], "stands twice"),
        ([], "Give the classes once"),
        (["--classes-file", "{file}"], "Entry 2 of"),
        (["--classes", "dog,cat", "--templates", "imagnet80"], "Did you mean imagenet80"),
    ],
)
def test_bad_arguments(call_vlkit, model, photos, tmp_path, options, message):
    file = tmp_path / "classes.txt"
    file.write_text("dog\n\ncat\n")
    called = call_vlkit("classify", photos, "--model", model, *(option.format(file=file) for option in options))
    assert called.code == 1 and message in called.err, called.err


def test_missing_and_empty_folders(call_vlkit, model, tmp_path):
    called = call_vlkit("classify", tmp_path / "nowhere", "--model", model, "--classes", "a,b")
    assert called.code == 1 and "does not exist" in called.err
    (tmp_path / "empty").mkdir()
    called = call_vlkit("classify", tmp_path / "empty", "--model", model, "--classes", "a,b")
    assert called.code == 1 and "image" in called.err


def test_a_second_run_goes_through_no_tower_and_classes_are_those_of_fp32(call_vlkit, model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "many"
    folder.mkdir()
    colors = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 3), dtype=np.uint8)
    for number, blocks in enumerate(colors):
        Image.fromarray(blocks).resize((32, 32)).save(folder / f"{number}.png")
    passes = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: passes.append(module))
    try:
        command = ("classify", folder, "--model", model, "--classes", "dog,cat,house,tree,a red car", "--json")
        first, num_first = call_vlkit(*command), len(passes)
        second = call_vlkit(*command)
        assert first.code == second.code == 0 and num_first > 0 and len(passes) == num_first
        call_vlkit(*command[:-1], "--report", tmp_path / "r.html")
        assert len(passes) == num_first
    finally:
        hook.remove()
    assert first.out == second.out
    exact = call_vlkit(*command, "--precision", "fp32", "--no-cache")

    def classes(called):
        return [json.loads(line)["classes"][0]["name"] for line in called.out.splitlines()]

    assert classes(exact) == classes(first)
    if pick_precision("auto", torch.device("cpu")) == "bf16":
        assert "of 40 images, bf16's closest calls, were classified in fp32" in first.err
