"""Every export gives, in the library it is for, the features of the model it was made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from vlkit.errors import ConfigError, ModelError
from vlkit.models.export import as_open_clip, export_hf, export_onnx, export_open_clip
from vlkit.models.hf_layout import config_to_hf, weights_from_hf, weights_to_hf
from vlkit.models.load import load_encoder
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
SMALL: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
WORDS = ["a photo of a cat", "two dogs running, fast!", "caf\u00e9 au lait", "x"]


def build(**changes: Any) -> OpenClipEncoder:
    torch.manual_seed(0)
    return build_encoder({**SMALL, **changes}).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenClipEncoder, Path]:
    encoder = build(quick_gelu=request.param)
    return encoder, export_hf(encoder, tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def photograph() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((90, 60), Image.Resampling.BICUBIC)


def test_transformers_computes_the_same_features(exported: tuple[OpenClipEncoder, Path]) -> None:
    from transformers import CLIPModel

    encoder, folder = exported
    model, pixels, tokens = CLIPModel.from_pretrained(folder).eval(), torch.rand(3, 3, 32, 32), encoder.tokenize(WORDS)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=encoder.normalize_pixels(pixels)).pooler_output
        text = model.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(image, encoder.encode_image(pixels, normalize=False), atol=1e-5, rtol=0)
        torch.testing.assert_close(text, encoder.encode_text(tokens, normalize=False), atol=1e-5, rtol=0)
        assert model.logit_scale.exp().item() == pytest.approx(encoder.logit_scale().item())


def test_transformers_reads_the_tokenizer_and_the_processor(
    exported: tuple[OpenClipEncoder, Path], photograph: Image.Image
) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    encoder, folder = exported
    ids = AutoTokenizer.from_pretrained(folder)(WORDS)["input_ids"]
    assert ids == encoder.tokenize.encode_ragged(WORDS)
    theirs = AutoImageProcessor.from_pretrained(folder)(photograph, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    ours = encoder.normalize_pixels(encoder.preprocess(pixels)[None])
    # Two grey levels: transformers resizes with torchvision or pillow, by release.
    assert (theirs - ours).abs().max() < 2.5 / 255 / 0.25


def test_hf_folders_load_again(exported: tuple[OpenClipEncoder, Path]) -> None:
    encoder, folder = exported
    again = load_encoder(f"hf:{folder}")
    pixels, tokens = torch.rand(2, 3, 32, 32), encoder.tokenize(WORDS)
    assert again.preprocess == encoder.preprocess
    assert again.tokenizer_id == encoder.tokenizer_id
    assert again.gives == {"image", "text"}
    torch.testing.assert_close(again.encode_image(pixels), encoder.encode_image(pixels), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.encode_text(again.tokenize(WORDS)), encoder.encode_text(tokens), atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="vlkit export hf:NAME --to open_clip"):
        _ = again.vision_tower


def test_a_model_of_transformers_goes_to_open_clip(exported: tuple[OpenClipEncoder, Path], tmp_path: Path) -> None:
    encoder, folder = exported
    export_open_clip(load_encoder(f"hf:{folder}"), tmp_path / "oc")
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'oc'}")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = plain.eval().encode_image(encoder.normalize_pixels(pixels), normalize=True)
        torch.testing.assert_close(features, encoder.encode_image(pixels), atol=1e-6, rtol=0)
    again = load_encoder(f"local-dir:{tmp_path / 'oc'}")
    assert {"vision_tower", "text_tower", "patches"} <= again.gives
    assert all(torch.equal(again.weights()[name], value) for name, value in encoder.weights().items())


def test_names_go_there_and_back() -> None:
    weights = build().weights()
    back = weights_from_hf(weights_to_hf(weights))
    assert back.keys() == weights.keys() - {"text.attn_mask"}
    assert all(torch.equal(value, weights[name]) for name, value in back.items())
    with pytest.raises(ModelError, match=r"no place for visual\.surprise"):
        weights_to_hf({"visual.surprise": torch.zeros(1)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init_logit_bias": -10}, "a logit_bias"),
        ({"vision_cfg": {**VIT, "pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision_cfg": {**VIT, "ls_init_value": 0.1}}, "vision_cfg.ls_init_value"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "text_cfg.no_causal_mask"),
        ({"vision_cfg": {**VIT, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}}, "vision_cfg.layers"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    encoder = build(**changes)
    with pytest.raises(ModelError, match="cannot be written for transformers") as error:
        config_to_hf(encoder.architecture)
    assert expected in str(error.value)
    with pytest.raises(ModelError):
        export_hf(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_siglip_has_no_form_in_open_clip_here(tmp_path: Path) -> None:
    timm = load_small_timm(tmp_path)
    with pytest.raises(ModelError, match="Only CLIP models of transformers"):
        as_open_clip(timm)
    with pytest.raises(ModelError, match="Only models on open_clip"):
        export_hf(timm, tmp_path / "out")


def load_small_timm(folder: Path) -> Any:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "w.safetensors")
    return load_encoder(f"timm:test_vit@{folder / 'w.safetensors'}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_gives_the_same_features(tmp_path: Path) -> None:
    import onnxruntime

    encoder = build(init_logit_bias=-10, vision_cfg={**VIT, "layers": 1}, text_cfg={**TEXT, "layers": 1})
    folder = export_onnx(encoder, tmp_path / "onnx")
    pixels, tokens = torch.rand(5, 3, 32, 32), encoder.tokenize(WORDS)
    full = torch.nn.functional.pad(tokens, (0, encoder.context_length - tokens.shape[1]))
    for name, given, expected in (
        ("pixels", pixels, encoder.encode_image(pixels)),
        ("tokens", full, encoder.encode_text(tokens)),
    ):
        file = {"pixels": "image.onnx", "tokens": "text.onnx"}[name]
        session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        for rows in (slice(0, 1), slice(None)):
            (features,) = session.run(["features"], {name: given[rows].numpy()})
            np.testing.assert_allclose(features, expected[rows].detach().numpy(), atol=1e-5)
    record = json.loads((folder / "vlkit.json").read_text())
    assert record["logit_bias"] == -10
    assert record["family"] == "sigmoid"
    assert record["preprocess_cfg"]["size"] == 32


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlkit\[export\]'"):
        export_onnx(build(), tmp_path / "out")
