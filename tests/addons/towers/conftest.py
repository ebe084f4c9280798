"""A small ViT in double precision, taken apart slowly: one image and one head at a time.

Fixtures:
    slow        `SlowVit`: the stream before a block, queries, keys and values of each head, and the way out.
    unchanged   `unchanged(edit)`: pooled features stay within the edit, patches change, and all is as before after it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class SlowVit:
    """The model in plain loops, from its weights alone."""

    def __init__(self, encoder: Any, images: Tensor) -> None:
        self.encoder, self.images = encoder, images
        self.visual = encoder.model.visual
        self.blocks = list(self.visual.transformer.resblocks)

    def stream(self, row: int, depth: int) -> Tensor:
        """(L,W) of one image before the block of that number."""
        x = self.encoder.vision_tower.embed(self.images[row : row + 1])
        for block in self.blocks[:depth]:
            x = block(x)
        return x[0]

    def heads(self, block: Any, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values (L,E) of each head."""
        width, size = x.shape[1], x.shape[1] // block.attn.num_heads
        projected = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        starts = [(part * width + head * size) for head in range(block.attn.num_heads) for part in range(3)]
        cut = [projected[:, start : start + size] for start in starts]
        return [(cut[i], cut[i + 1], cut[i + 2]) for i in range(0, len(cut), 3)]

    def mixed(self, block: Any, x: Tensor, weights: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(L,W) what the attention adds, with the map (L,L) of each head's queries, keys and values."""
        out = [weights(q, k, v) @ v for q, k, v in self.heads(block, x)]
        return block.attn.out_proj(torch.cat(out, dim=1))

    def patches(self, out: Tensor) -> Tensor:
        """(P,D) unit norm, of what leaves the last block (L,W)."""
        return F.normalize(self.visual.ln_post(out)[1:] @ self.visual.proj, dim=-1)


@pytest.fixture(scope="session")
def slow() -> SlowVit:
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    encoder = build_encoder(ARCHITECTURE).eval().double().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if name.endswith("in_proj_weight"):  # fresh attention is nearly uniform
            parameter.data *= 8
    return SlowVit(encoder, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double())


@pytest.fixture
def unchanged(slow: SlowVit) -> Callable[[Any], None]:
    def check(edit: Any) -> None:
        encoder, images = slow.encoder, slow.images
        pooled, patches = encoder.encode_image(images), encoder.encode_patches(images)
        with edit.edit(encoder):
            assert torch.equal(encoder.encode_image(images), pooled), "the class position keeps the stock block"
            inside = encoder.encode_patches(images)
            assert not torch.allclose(inside, patches, atol=1e-3)
            assert torch.allclose(encoder.encode_patches(images[1:]), inside[1:]), "batches leak into each other"
        with pytest.raises(RuntimeError, match="stop"), edit.edit(encoder):
            raise RuntimeError("stop")
        assert torch.equal(encoder.encode_image(images), pooled)
        assert torch.equal(encoder.encode_patches(images), patches)
        assert not any(block._forward_hooks for block in slow.blocks)

    return check
