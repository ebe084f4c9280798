"""The order of layers: open_clip's own groups, timm's, and what follows for freezing and learning rates."""

import pytest
import torch
from torch import nn

from vlkit.errors import ModelError
from vlkit.models.layers import freeze, layer_rates, layers_of
from vlkit.models.open_clip_encoder import build_encoder

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 3}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TIMM = {"image_size": 32, "timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg",
        "timm_proj": "linear"}  # fmt: skip
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}


def make(vision: dict[str, object]) -> nn.Module:
    return build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT})


@pytest.mark.parametrize("unlocked", [1, 2, 3])
def test_freezing_the_image_tower_is_what_open_clip_locks(unlocked: int) -> None:
    ours, theirs = make(VIT), make(VIT)
    freeze(ours, "image", unlocked)
    theirs.model.visual.lock(unlocked_groups=unlocked)
    expected = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in ours.named_parameters()} == expected


def test_groups_of_the_text_tower() -> None:
    groups = layers_of(make(VIT), "text")
    assert groups[0] == ["model.text.positional_embedding", "model.text.token_embedding.weight"]
    assert groups[-1] == ["model.text.text_projection"]
    assert len(groups) == 5 and any("ln_final" in name for name in groups[-2])


@pytest.mark.parametrize("vision", [VIT, TIMM, RESNET], ids=["ViT", "timm", "ResNet"])
def test_every_parameter_is_in_one_group(vision: dict[str, object]) -> None:
    encoder = make(vision)
    for side, tower in (("image", "visual"), ("text", "text")):
        names = [name for group in layers_of(encoder, side) for name in group]  # type: ignore[arg-type]
        expected = [name for name, _ in encoder.named_parameters() if name.startswith(f"model.{tower}.")]
        assert sorted(names) == sorted(expected)


def test_layer_wise_rates_by_hand() -> None:
    rates = layer_rates(make(VIT), 0.5)
    # Image: input, block 0, block 1 with the last norm, projection.
    assert rates["model.visual.proj"] == 1
    assert rates["model.visual.ln_post.weight"] == rates["model.visual.transformer.resblocks.1.ln_1.weight"] == 0.5
    assert rates["model.visual.transformer.resblocks.0.ln_1.weight"] == 0.25
    assert rates["model.visual.conv1.weight"] == 0.125
    assert rates["model.text.token_embedding.weight"] == 0.5**4
    assert "model.logit_scale" not in rates


def test_what_has_no_order_is_refused() -> None:
    encoder = make(VIT)
    encoder.model.visual = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"no known order: where does model\.visual\.0\.weight belong"):
        freeze(encoder, "image", 1)
    freeze(encoder, "image")
    assert not encoder.model.visual[0].weight.requires_grad
    with pytest.raises(ModelError, match="has 5 layers; 5 cannot be its last ones only"):
        freeze(encoder, "text", 5)
    assert torch.is_tensor(encoder.logit_scale())
