import pytest
import torch

from vlkit.errors import ConfigError, ModelError
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.patch_stride import patch_stride

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}


def test_a_finer_grid_and_back() -> None:
    encoder = build_encoder({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}).eval()
    images = torch.rand(2, 3, 32, 32)
    before = encoder.encode_patches(images)
    with patch_stride(encoder, 4):
        fine = encoder.vision_tower.embed(images)
        assert encoder.encode_patches(images).shape == (2, 49, 8)
    with patch_stride(encoder, 8):
        assert torch.equal(encoder.encode_patches(images), before)
    assert torch.equal(encoder.encode_patches(images), before)
    # Every second patch of the finer grid is a patch of the plain one, before positions are added.
    visual = encoder.model.visual
    visual.positional_embedding.data.zero_()
    with patch_stride(encoder, 4):
        fine = encoder.vision_tower.embed(images)[:, 1:].unflatten(1, (7, 7))
    torch.testing.assert_close(fine[:, ::2, ::2].flatten(1, 2), encoder.vision_tower.embed(images)[:, 1:])


def test_strides_and_towers_that_cannot_be() -> None:
    encoder = build_encoder({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT})
    with pytest.raises(ConfigError, match="patches of this model have 8"), patch_stride(encoder, 9):
        pass
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    with (
        pytest.raises(ModelError, match="ResNet"),
        patch_stride(build_encoder({"embed_dim": 8, "vision_cfg": resnet, "text_cfg": TEXT}), 4),
    ):
        pass
