"""`vlkit export` on a small model."""

import json

import torch

from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def test_there_and_back(call_vlkit, tmp_path):
    torch.manual_seed(0)
    save_encoder(build_encoder(SMALL), tmp_path / "model")
    result = call_vlkit(
        "export", f"local-dir:{tmp_path / 'model'}", "--to", "hf", "--out", str(tmp_path / "hf"), "--json"
    )
    assert result.code == 0, result.err
    assert {"config.json", "model.safetensors", "vocab.json"} <= set(json.loads(result.out)["files"])
    result = call_vlkit("export", f"hf:{tmp_path / 'hf'}", "--to", "open_clip", "--out", str(tmp_path / "back"))
    assert result.code == 0, result.err
    assert "open_clip_config.json" in result.err


def test_unknown_target(call_vlkit, tmp_path):
    result = call_vlkit("export", "run:x", "--to", "onx", "--out", str(tmp_path / "out"))
    assert result.code == 1
    assert "Did you mean onnx" in result.err
