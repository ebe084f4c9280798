"""A residual block of open_clip with its attention in the open: queries, keys, values and the map between them.

open_clip's blocks call a fused attention that gives no map. Methods that read or replace the map (relevance, LeGrad,
the decomposition by heads, the switches of the last block) go through these functions, which use the block's own
weights and give its output to float precision:

    parts = attention_parts(block.module, x)
    weights = attention_map(parts, block.mask(x))            # (B,H,L,L)
    x = x + mix_values(block.module, weights, parts.value)   # what the attention adds
    x = x + feed_forward(block.module, x)
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.errors import ModelError


class AttentionParts(NamedTuple):
    """What the attention of one block computes from its input; E is the width of a head."""

    query: Tensor  # (B,H,L,E)
    key: Tensor  # (B,H,L,E)
    value: Tensor  # (B,H,L,E)


def attention_parts(module: nn.Module, x: Tensor) -> AttentionParts:
    """Queries, keys and values of a block's attention.

    Args:
        module: a residual block of open_clip (`tower.blocks[i].module`).
        x: (B,L,W) the block's input, before its norm.

    Raises:
        ModelError: a block of another make.
    """
    block = _known(module)
    stacked = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    heads = block.attn.num_heads
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in stacked.chunk(3, dim=-1))
    return AttentionParts(query, key, value)


def attention_map(parts: AttentionParts, mask: Tensor | None = None) -> Tensor:
    """Softmax of the scaled products of queries and keys, plus an additive mask (L,L): (B,H,L,L)."""
    weights: Tensor = attention_logits(parts.query, parts.key, mask).softmax(dim=-1)
    return weights


def attention_logits(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled products (B,H,L,L) of (B,H,L,E) with (B,H,L,E), plus an additive mask (L,L)."""
    logits: Tensor = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return logits if mask is None else logits + mask.to(logits.dtype)


def mix_values(module: nn.Module, weights: Tensor, value: Tensor) -> Tensor:
    """What a block's attention adds to its input, for any map.

    Args:
        module: a residual block of open_clip.
        weights: (B,H,L,L) the attention map.
        value: (B,H,L,E).

    Returns:
        (B,L,W), through the output projection and the block's layer scale.
    """
    return join_heads(module, weights @ value)


def join_heads(module: nn.Module, mixed: Tensor) -> Tensor:
    """What a block's attention adds, out of the mixed values of each head (B,H,L,E): (B,L,W)."""
    block = _known(module)
    out: Tensor = block.ls_1(block.attn.out_proj(mixed.transpose(1, 2).flatten(2)))
    return out


def feed_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a block's MLP adds to x (B,L,W), through its norm and layer scale: (B,L,W)."""
    block = _known(module)
    out: Tensor = block.ls_2(block.mlp(block.ln_2(x)))
    return out


def head_outputs(module: nn.Module, value: Tensor) -> Tensor:
    """What each position of each head would add if it had all attention, without the output projection's bias.

    Args:
        module: a residual block of open_clip.
        value: (B,H,L,E).

    Returns:
        (B,H,L,W).
    """
    block = _known(module)
    weight = block.attn.out_proj.weight  # (W, H*E)
    per_head = weight.unflatten(-1, (block.attn.num_heads, -1)).permute(1, 2, 0)  # (H,E,W)
    out: Tensor = block.ls_1(value @ per_head)
    return out


def output_bias(module: nn.Module) -> Tensor:
    """(W,) what the output projection of a block's attention adds whatever it attends to."""
    block = _known(module)
    out: Tensor = block.ls_1(block.attn.out_proj.bias)
    return out


def _known(module: nn.Module) -> Any:
    if type(module).__name__ != "ResidualAttentionBlock" or not isinstance(getattr(module, "attn", None), nn.Module):
        raise ModelError(
            f"A block of type {type(module).__name__} cannot be taken apart. Take a model with open_clip's plain "
            "transformer blocks, e.g. ViT-B-32."
        )
    return module
