"""`vlkit interpret` on a small model: pictures for texts, a table of heads, and what is asked for."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_encoder(build_encoder(SMALL), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / f"{number}.png")
    return f"local-dir:{tmp_path / 'model'}"


@pytest.mark.parametrize("method", ["decomposition", "legrad", "relevance"])
def test_pictures(call_vlkit, model, tmp_path, method):
    called = call_vlkit(
        "interpret",
        method,
        tmp_path / "images",
        "--model",
        model,
        "--text",
        "a dog",
        "--text",
        "$\\frac{",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert called.code == 0, called.err
    lines = json.loads(called.out)
    assert [Path(line["image"]).name for line in lines] == ["0.png", "1.png", "2.png"]
    with Image.open(lines[0]["picture"]) as sheet:
        assert sheet.width > sheet.height


def test_heads(call_vlkit, model, tmp_path):
    (tmp_path / "texts.txt").write_text("a red thing\n\na green thing\nthe sea\n")
    called = call_vlkit(
        "interpret",
        "text_span",
        tmp_path / "images",
        "--model",
        model,
        "--texts",
        tmp_path / "texts.txt",
        "--out",
        tmp_path / "out",
        "--last-layers",
        "1",
        "--num-texts",
        "2",
        "--json",
    )
    assert called.code == 0, called.err
    lines = json.loads(called.out)
    assert [(line["layer"], line["head"], len(line["texts"])) for line in lines] == [(1, 0, 2), (1, 1, 2)]
    assert json.loads((tmp_path / "out" / "heads.json").read_text()) == lines


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["legrat", "x", "--text", "a"], "Did you mean legrad"),
        (["legrad", "x"], "needs to know what to look for"),
        (["text_span", "x"], "needs a pool of texts"),
    ],
)
def test_what_is_missing_is_said(call_vlkit, tmp_path, arguments, expected):
    called = call_vlkit("interpret", *arguments, "--model", "run:x", "--out", tmp_path)
    assert called.code == 1
    assert expected in called.err
