"""A timm tower under a new text tower: its features and its preprocessing, in a model that saves and freezes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from vlkit.config import load_run
from vlkit.errors import ConfigError, ModelError
from vlkit.models.image_tower import with_trained_tower
from vlkit.models.layers import freeze
from vlkit.models.load import load_encoder
from vlkit.models.saved import save_encoder
from vlkit.training import assemble

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWER = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
LIT: dict[str, Any] = {"embed_dim": 24, "vision_cfg": TOWER, "text_cfg": TEXT}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    return f"timm:test_vit@{tmp_path / 'w.safetensors'}"


def test_the_image_tower_is_timms_and_its_projection_is_trained_alone(weights: str, tmp_path: Path) -> None:
    encoder = with_trained_tower(LIT, weights).eval()
    alone = load_encoder(weights)
    pixels = torch.rand(2, 3, 160, 160)
    assert (encoder.preprocess.mean, encoder.preprocess.std) == (alone.preprocess.mean, alone.preprocess.std)
    visual: Any = encoder.model.visual
    with torch.no_grad():
        expected = visual.head(alone.encode_image(pixels, normalize=False))
        torch.testing.assert_close(encoder.encode_image(pixels, normalize=False), expected, atol=1e-6, rtol=0)
    freeze(encoder, "image", 1)
    trained = {name for name, parameter in visual.named_parameters() if parameter.requires_grad}
    assert trained == {"head.proj.weight"}
    again = load_encoder(f"local-dir:{save_encoder(encoder, tmp_path / 'saved')}")
    assert again.preprocess == encoder.preprocess
    assert all(torch.equal(value, encoder.weights()[name]) for name, value in again.weights().items())


def test_a_run_file_names_it(weights: str, tmp_path: Path) -> None:
    tree = {
        "run": {"out": str(tmp_path / "out"), "steps": 1, "device": "cpu"},
        "model": {"architecture": LIT, "init_image": weights, "freeze": ["image"], "unfreeze": {"image": 1}},
        "data": {"train": "nowhere.tar"},
    }
    encoder = assemble.build_learner(load_run(tree), torch.device("cpu")).encoder
    trunk = load_encoder(weights).weights()
    assert all(torch.equal(encoder.weights()[f"visual.trunk.{name}"], value) for name, value in trunk.items())
    tree["model"] = {"init": "run:x", "init_image": weights}
    with pytest.raises(ConfigError, match="init brings both towers"):
        load_run(tree)


def test_towers_that_do_not_fit(weights: str) -> None:
    with pytest.raises(ModelError, match=r"expected timm:NAME\.TAG"):
        with_trained_tower(LIT, "open_clip:ViT-B-32/openai")
    plain = {**LIT, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}}
    with pytest.raises(ModelError, match=r"image tower of inline is open_clip's own.*timm_model_name = 'test_vit'"):
        with_trained_tower(plain, weights)
    other = {**LIT, "vision_cfg": {**TOWER, "timm_model_name": "test_resnet", "timm_pool": "avg"}}
    with pytest.raises(ModelError, match=r"does not fit the image tower test_resnet of inline: \d+ missing"):
        with_trained_tower(other, weights)
