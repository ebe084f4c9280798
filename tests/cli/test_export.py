"""`vlkit export` on a small model."""

import json

import torch

from vlkit.models.export import as_open_clip, export_hf
from vlkit.models.load import load_encoder
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


def test_between_two_models(call_vlkit, tmp_path):
    torch.manual_seed(0)
    start, tuned = build_encoder(SMALL).eval(), build_encoder(SMALL).eval()
    export_hf(start, tmp_path / "hf")
    save_encoder(start, tmp_path / "start")
    save_encoder(tuned, tmp_path / "tuned")
    # What training makes of a model of transformers is on open_clip, and is mixed with where it came from.
    from_hf = as_open_clip(load_encoder(f"hf:{tmp_path / 'hf'}"))
    from_hf.model.load_state_dict(tuned.weights())
    save_encoder(from_hf, tmp_path / "tuned_hf")
    for origin, model in ((f"local-dir:{tmp_path / 'start'}", "tuned"), (f"hf:{tmp_path / 'hf'}", "tuned_hf")):
        arguments = ["export", f"local-dir:{tmp_path / model}", "--to", "open_clip", "--out", str(tmp_path / "out")]
        result = call_vlkit(*arguments, "--interpolate", f"{origin}=0.25", "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["interpolate"] == {"start": origin, "alpha": 0.25}
        found = load_encoder(f"local-dir:{tmp_path / 'out'}").weights()
        for name, value in found.items():
            expected = 0.75 * start.weights()[name] + 0.25 * tuned.weights()[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    result = call_vlkit(*arguments, "--interpolate", "0.5")
    assert result.code == 1 and "expected START=ALPHA" in result.err
    result = call_vlkit(*arguments, "--interpolate", "run:x=half")
    assert result.code == 1 and "expected START=ALPHA" in result.err
    save_encoder(build_encoder({**SMALL, "embed_dim": 8}), tmp_path / "other")
    result = call_vlkit(*arguments, "--interpolate", f"local-dir:{tmp_path / 'other'}=0.5")
    assert result.code == 1 and "these two differ in model_cfg" in result.err
