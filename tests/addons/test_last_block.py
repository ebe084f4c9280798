import io

import pytest
import torch
from PIL import Image

from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import Vectors
from vlkit.addons.last_block import grid_of, require_patches, switched
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.addons.towers.maskclip import MaskClip, identity_map
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ModelError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder
from vlkit.models.attention import attention_map
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
_FILE = io.BytesIO()
Image.new("RGB", (40, 40), "red").save(_FILE, "PNG")
PNG = _FILE.getvalue()
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}


def test_the_attention_of_the_block_itself_changes_nothing() -> None:
    encoder = build_encoder({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}).eval().double()
    images = torch.rand(2, 3, 32, 32).double()
    stock = encoder.encode_patches(images)
    with switched(encoder, lambda parts, grid: attention_map(parts), residual=True):
        torch.testing.assert_close(encoder.encode_patches(images), stock)
    with switched(encoder, lambda parts, grid: attention_map(parts), residual=False):
        assert not torch.allclose(encoder.encode_patches(images), stock, atol=1e-2), "residual path and MLP count"
    with switched(encoder, identity_map, residual=False):
        by_switch = encoder.encode_patches(images)
    with MaskClip().edit(encoder):
        assert torch.equal(encoder.encode_patches(images), by_switch)


def test_towers_without_patches_in_the_joint_space() -> None:
    after_pooling = {**VISION, "final_ln_after_pool": True, "pool_type": "avg"}
    encoder = build_encoder({"embed_dim": 24, "vision_cfg": after_pooling, "text_cfg": TEXT}).eval()
    with pytest.raises(ModelError, match="normalises after pooling"), MaskClip().edit(encoder):
        pass
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    encoder = build_encoder({"embed_dim": 24, "vision_cfg": resnet, "text_cfg": TEXT}).eval()
    with pytest.raises(ModelError, match="ResNet"):
        require_patches(encoder)


def test_grid() -> None:
    assert grid_of(12, (3, 4)) == (3, 4)
    assert grid_of(49, (4, 4)) == (7, 7)


@pytest.mark.parametrize("name", ["calip", "pacl", "clearclip", "head_ablation"])
def test_an_attention_pooled_tower_is_refused_by_what_needs_its_patches(name: str) -> None:
    """As SigLIP's: its patches are mixed once more before they reach the joint space."""
    pooled = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
    encoder = build_encoder({"embed_dim": 24, "vision_cfg": pooled, "text_cfg": TEXT}).eval()
    model = Embedder(encoder, "attention-pooled")
    source = CachedEmbedder(lambda: model, None, card_of(model))
    record = Record("one", ImageRef(data=PNG))
    with pytest.raises(ModelError, match="an attention-pooled ViT"):
        passes = Passes(source, local=True)
        images = Part("train", Vectors("image", source.embed_images([record])), None, (record,))
        given = Reference(images=images, class_names=(ClassName("a", ("a",)),), passes=passes)
        settings = ":heads=0.0" if name == "head_ablation" else ""
        pipeline = Pipeline([make_addon(name + settings)]).fit(given, source)
        passes.read([record], pipeline.edits)
