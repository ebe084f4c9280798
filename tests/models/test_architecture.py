"""Architectures are checked before anything is built, and every one that open_clip ships passes."""

from typing import Any

import open_clip
import pytest

from vlkit.errors import ConfigError, ModelError
from vlkit.models import catalogue
from vlkit.models.architecture import published_architecture, resolve_architecture
from vlkit.models.open_clip_encoder import build_encoder

TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
SMALL: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}


def test_every_shipped_architecture_resolves() -> None:
    for name in catalogue.architectures():
        resolved = resolve_architecture(name)
        assert resolved.preprocess.size == resolved.image_size, name
        assert resolved.exported_config()["custom_text"] is True, name


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViT-B-33", "Did you mean ViT-B-32"),
        ("vit-b-32-quickgelu", "Did you mean ViT-B-32-quickgelu"),
        ({"embed_dim": 16, "vision_cfg": VIT}, "lacks text_cfg"),
        ({**SMALL, "vison_cfg": {}}, "unknown key 'vison_cfg'. Did you mean vision_cfg"),
        ({**SMALL, "text_cfg": 3}, "text_cfg is 3; expected a table"),
        ({**SMALL, "vision_cfg": {**VIT, "patch": 8}}, "unknown key vision_cfg.patch. Did you mean patch_"),
        ({**SMALL, "vision_cfg": {**VIT, "image_size": 36}}, "36 is no multiple of the patch size 8"),
        ({**SMALL, "vision_cfg": {**VIT, "width": 48}}, "width 48 is no multiple of head_width 64"),
        ({**SMALL, "vision_cfg": {**VIT, "layers": [1, 1, 1, 1], "image_size": 24}}, "24 does not suit a ResNet"),
        ({**SMALL, "vision_cfg": {**VIT, "image_size": [32, 64]}}, "only square"),
        ({**SMALL, "text_cfg": {**TEXT, "vocab_size": 1000}}, "vocab_size 1000 is too small for its tokenizer"),
        ({**SMALL, "text_cfg": {**TEXT, "heads": 3}}, "open_clip cannot build"),
        ({**SMALL, "vision_cfg": {"timm_model_name": "resnot10t", "image_size": 32}}, "open_clip cannot build"),
    ],
)
def test_what_is_wrong_is_named(architecture: Any, message: str) -> None:
    with pytest.raises(ModelError) as error:
        build_encoder(architecture)
    assert message in str(error.value)


def test_sizes_are_checked_after_a_change() -> None:
    with pytest.raises(ModelError, match="36 is no multiple"):
        build_encoder(SMALL, image_size=36)
    changed = build_encoder(SMALL, image_size=48, context_length=8)
    assert changed.image_size == changed.preprocess.size == 48
    assert changed.context_length == 8 and changed.vision_tower.grid == (6, 6)


def test_a_timm_tower_of_a_fixed_size_keeps_it() -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "", "timm_proj": "linear"}
    with pytest.raises(ModelError, match="timm tower"):
        build_encoder({**SMALL, "vision_cfg": vision}, image_size=96)


def test_preprocessing_is_kept_with_the_architecture() -> None:
    record = {"mean": 0.5, "std": [0.5, 0.5, 0.5], "resize_mode": "squash", "interpolation": "random", "url": "x"}
    encoder = build_encoder(SMALL, preprocess=record)
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5) and encoder.preprocess.resize_mode == "squash"
    assert encoder.preprocess.interpolation == "bicubic" and encoder.preprocess.size == 32
    assert encoder.record()["preprocess_cfg"]["resize_mode"] == "squash"
    with pytest.raises(ConfigError, match="squish"):
        build_encoder(SMALL, preprocess={"resize_mode": "squish"})


def test_every_published_model_has_its_own_preprocessing_and_activation() -> None:
    for offer in catalogue.offers():
        if offer.tag:
            resolved = published_architecture(offer.architecture, offer.tag)
            assert resolved.preprocess.to_open_clip().items() >= expected_preprocess(offer.architecture, offer.tag)
    # open_clip itself builds these without quick-gelu and warns.
    assert published_architecture("ViT-B-32", "openai").model_cfg["quick_gelu"] is True
    assert "quick_gelu" not in published_architecture("ViT-B-32", "laion2b_s34b_b79k").model_cfg
    assert published_architecture("roberta-ViT-B-32", "laion2b_s12b_b32k").model_cfg["quick_gelu"] is True
    assert published_architecture("ViT-B-16-SigLIP", "webli").preprocess.mean == (0.5, 0.5, 0.5)


def expected_preprocess(architecture: str, tag: str) -> Any:
    record = open_clip.get_pretrained_cfg(architecture, tag)
    return {
        "mean": list(record["mean"]),
        "std": list(record["std"]),
        "resize_mode": record["resize_mode"],
        "interpolation": record["interpolation"],
        "size": open_clip.get_model_config(architecture)["vision_cfg"]["image_size"],
    }.items()


def test_the_given_mapping_is_not_changed() -> None:
    before = {**SMALL, "vision_cfg": dict(VIT), "text_cfg": dict(TEXT)}
    build_encoder(SMALL, image_size=48, context_length=8)
    assert before == SMALL
