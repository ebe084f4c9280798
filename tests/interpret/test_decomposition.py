"""The terms add up to the feature, and each is what a slow recomputation of one head gives."""

from typing import Any

import pytest
import torch

from vlkit.errors import ModelError
from vlkit.interpret.decomposition import decompose, heat_maps
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder

VIT = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def build(**vision: Any) -> OpenClipEncoder:
    torch.manual_seed(0)
    encoder = build_encoder({"embed_dim": 24, "vision_cfg": {**VIT, **vision}, "text_cfg": TEXT}).eval().double()
    for parameter in encoder.parameters():  # fresh weights have zero biases, which would hide a lost one
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder


@pytest.fixture(scope="module")
def encoder() -> OpenClipEncoder:
    return build()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.3}], ids=["plain", "layer scale"])
def test_the_terms_add_up_to_the_feature(vision: dict[str, Any], images: torch.Tensor) -> None:
    encoder = build(**vision)
    parts = decompose(encoder, images)
    expected = encoder.encode_image(images)
    torch.testing.assert_close(parts.total(), expected)
    shared = parts.with_shared_biases()
    assert not shared.biases.any()
    torch.testing.assert_close(shared.total(), expected)
    assert parts.heads.shape == (2, 3, 4, 24)
    assert parts.mlps.shape == parts.biases.shape == (2, 4, 24)


def last_block(encoder: OpenClipEncoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its normed input (B,L,W), torch's attention weights (B,H,L,L), deviation (B,) of the class token it leaves."""
    visual, tower = encoder.model.visual, encoder.vision_tower
    block = visual.transformer.resblocks[-1]
    x = tower.embed(images)
    for earlier in tower.blocks[:-1]:
        x = earlier(x)
    normed = block.ln_1(x)
    _, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
    final = tower.through_blocks(images)[:, 0]
    return normed, weights, (final.var(dim=-1, unbiased=False) + visual.ln_post.eps).sqrt()


def test_one_head_by_hand(encoder: OpenClipEncoder, images: torch.Tensor) -> None:
    """Head 2 of the last layer, written out for the class token with torch's own attention weights."""
    visual = encoder.model.visual
    block = visual.transformer.resblocks[-1]
    with torch.no_grad():
        normed, weights, deviation = last_block(encoder, images)
        rows = slice(2 * 16, 3 * 16)
        width = 64
        value = normed @ block.attn.in_proj_weight[2 * width :][rows].T + block.attn.in_proj_bias[2 * width :][rows]
        written = weights[:, 2, :1] @ value @ block.attn.out_proj.weight[:, rows].T
        centred = written[:, 0] - written[:, 0].mean(dim=-1, keepdim=True)
        term = centred / deviation[:, None] * visual.ln_post.weight @ visual.proj
        term = term / encoder.encode_image(images, normalize=False).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(decompose(encoder, images).heads[:, -1, 2], term)


def test_heat_maps_are_the_heads_parts_by_patch(encoder: OpenClipEncoder, images: torch.Tensor) -> None:
    """Each patch's part of the last layer, head by head with torch's own attention weights."""
    directions = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    maps = heat_maps(encoder, images, directions, last_layers=1)
    visual = encoder.model.visual
    block = visual.transformer.resblocks[-1]
    with torch.no_grad():
        normed, weights, deviation = last_block(encoder, images)
        values = normed @ block.attn.in_proj_weight[128:].T + block.attn.in_proj_bias[128:]
        length = encoder.encode_image(images, normalize=False).norm(dim=-1)
        expected = torch.zeros(2, 3, 17, dtype=torch.float64)
        for head in range(4):
            rows = slice(head * 16, head * 16 + 16)
            written = weights[:, head, 0, :, None] * values[:, :, rows] @ block.attn.out_proj.weight[:, rows].T
            centred = (written - written.mean(dim=-1, keepdim=True)) / (deviation * length)[:, None, None]
            expected += torch.einsum("bld,cd->bcl", centred * visual.ln_post.weight @ visual.proj, directions)
    torch.testing.assert_close(maps, expected[:, :, 1:].unflatten(-1, (4, 4)))
    # With the class token's own part they are what the heads of that layer write.
    whole = decompose(encoder, images).heads[:, -1].sum(1) @ directions.T
    torch.testing.assert_close(maps.sum((2, 3)) + expected[:, :, 0], whole)


def test_heat_maps_add_up_over_layers(encoder: OpenClipEncoder, images: torch.Tensor) -> None:
    directions = torch.eye(24, dtype=torch.float64)[:2]
    torch.testing.assert_close(
        heat_maps(encoder, images, directions), heat_maps(encoder, images, directions, last_layers=3)
    )
    assert not torch.allclose(
        heat_maps(encoder, images, directions), heat_maps(encoder, images, directions, last_layers=2)
    )


def test_towers_that_pool_otherwise_are_refused(images: torch.Tensor) -> None:
    for vision in ({"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}):
        with pytest.raises(ModelError, match="does not read its feature off the class token"):
            decompose(build(**vision), images)
