"""The image feature as a sum: what every head of every layer and every MLP writes into it.

    parts = decompose(encoder, images)
    parts.total()                        # (B,D): exactly encoder.encode_image(images)
    parts.heads[:, -1, 3]                # (B,D): what head 3 of the last layer writes
    heat_maps(encoder, images, class_weights)     # (B,C,rows,columns): where a class is written from

The class token's residual stream is a sum of what embedding, attention heads and MLPs add; the last norm is linear
once its mean and deviation are those of the whole sum; projection and division by the length are linear too.

Source: Gandelsman, Efros and Steinhardt 2024, "Interpreting CLIP's Image Representation via Text-Based
Decomposition", ICLR, arXiv:2310.05916; released code clip_prs.
Differs: The output projection's bias is a term of its own (`biases`) instead of being shared over heads and tokens,
and the last norm's bias likewise; shares of them are added where the paper's figures need them (`with_shared_biases`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlkit.errors import ModelError
from vlkit.interpret.last_layers import first_of_last
from vlkit.models.attention import (
    attention_logits,
    attention_map,
    attention_parts,
    feed_forward,
    head_outputs,
    mix_values,
    output_bias,
)
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tower import VisionTower


class Decomposition(NamedTuple):
    """Terms whose sum is the unit-norm image feature. N layers, H heads."""

    heads: Tensor  # (B,N,H,D) what each head writes into the class token
    mlps: Tensor  # (B,N+1,D) the embedding's class token first, then the MLP of each layer
    biases: Tensor  # (B,N+1,D) of each layer's output projection, then of the last norm
    length: Tensor  # (B,) of the feature before it was brought to unit norm

    def total(self) -> Tensor:
        """(B,D) the sum of all terms."""
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.biases.sum(1)

    def with_shared_biases(self) -> "Decomposition":
        """The paper's terms: each layer's bias shared by its heads, the norm's by all terms; `biases` are zero."""
        num_layers, num_heads = self.heads.shape[1:3]
        share = self.biases[:, -1] / (num_layers * num_heads + num_layers + 1)
        heads = self.heads + self.biases[:, :-1, None] / num_heads + share[:, None, None]
        return self._replace(heads=heads, mlps=self.mlps + share[:, None], biases=torch.zeros_like(self.biases))


class _LastNorm(NamedTuple):
    """The last norm, projection and length of one batch as one linear map of residual terms."""

    weight: Tensor  # (W,)
    bias: Tensor  # (W,)
    deviation: Tensor  # (B,)
    projection: Tensor  # (W,D)
    length: Tensor  # (B,)

    def of(self, terms: Tensor) -> Tensor:
        """(B,...,W) -> (B,...,D)."""
        shape = (-1, *[1] * (terms.ndim - 1))
        centred = terms - terms.mean(dim=-1, keepdim=True)
        scaled = centred * self.weight / (self.deviation * self.length).view(shape)
        return scaled @ self.projection

    def back(self, directions: Tensor) -> Tensor:
        """(C,D) directions -> (B,C,W): their product with a residual term is the term's part of the similarity."""
        in_width = (directions @ self.projection.T) * self.weight
        centred = in_width - in_width.mean(dim=-1, keepdim=True)
        return centred[None] / (self.deviation * self.length)[:, None, None]


@torch.no_grad()
def decompose(encoder: DualEncoder, images: Tensor) -> Decomposition:
    """Exact decomposition of the image features by heads, MLPs and biases.

    Args:
        encoder: with an open_clip ViT that reads its class token after the last norm (any CLIP ViT).
        images: (B,3,S,S) uint8, or float in [0,1].

    Raises:
        ModelError: the encoder has no such tower.
    """
    tower = class_token_tower(encoder)
    x = tower.embed(images)
    mlps, heads, biases = [x[:, 0]], [], []
    for block in tower.blocks:
        parts = attention_parts(block.module, x)
        weights = attention_map(parts)
        x = x + mix_values(block.module, weights, parts.value)
        # Only the class token's row: what the others receive reaches the feature through later layers.
        mixed = weights[:, :, :1] @ parts.value
        heads.append(head_outputs(block.module, mixed)[:, :, 0])
        biases.append(output_bias(block.module).expand(len(x), -1))
        added = feed_forward(block.module, x)
        mlps.append(added[:, 0])
        x = x + added
    last = _last_norm(encoder, tower, x[:, 0])
    norm_bias = (last.bias @ last.projection)[None] / last.length[:, None]
    return Decomposition(
        heads=last.of(torch.stack(heads, dim=1)),
        mlps=last.of(torch.stack(mlps, dim=1)),
        biases=torch.cat([last.of(torch.stack(biases, dim=1)), norm_bias[:, None]], dim=1),
        length=last.length,
    )


@torch.no_grad()
def heat_maps(encoder: DualEncoder, images: Tensor, directions: Tensor, last_layers: int | None = None) -> Tensor:
    """Which patches the attention heads write a direction from, into the class token.

    Args:
        encoder: as for `decompose`.
        images: (B,3,S,S) uint8, or float in [0,1].
        directions: (C,D), e.g. class vectors less their mean, as the paper does for segmentation.
        last_layers: only the heads of so many last layers; default all.

    Returns:
        (B,C,rows,columns): the parts of the similarity with each direction that come through each patch. With the
        class token's own part and the MLPs' they add up to the similarity.

    Raises:
        ModelError: the encoder has no such tower.
        ConfigError: more layers than there are.
    """
    tower = class_token_tower(encoder)
    first = 0 if last_layers is None else first_of_last(last_layers, tower.blocks)
    x, kept = tower.embed(images), []
    for number, block in enumerate(tower.blocks):
        parts = attention_parts(block.module, x)
        weights = attention_map(parts)
        if number >= first:
            kept.append((block.module, weights[:, :, 0], parts.value))
        x = x + mix_values(block.module, weights, parts.value)
        x = x + feed_forward(block.module, x)
    functional = _last_norm(encoder, tower, x[:, 0]).back(directions)  # (B,C,W)
    total = x.new_zeros(len(x), len(directions), x.shape[1])
    for module, row, value in kept:
        # One head at a time: all heads' outputs at every token would be H times the residual stream.
        for head in range(row.shape[1]):
            alone = torch.zeros_like(value)
            alone[:, head] = value[:, head]
            written = head_outputs(module, alone)[:, head] * row[:, head, :, None]  # (B,L,W)
            total += torch.einsum("bcw,blw->bcl", functional, written)
    maps: Tensor = total[:, :, 1:].unflatten(-1, tower.grid)
    return maps


def class_token_heads(module: nn.Module, x: Tensor, heads: Sequence[int]) -> Tensor:
    """What some heads of one block write into the class token: (B,n,W), without the output projection's bias.

    Args:
        module: the block.
        x: (B,L,W) its input.
        heads: n of its heads.
    """
    parts = attention_parts(module, x)
    weights = attention_logits(parts.query[:, :, :1], parts.key).softmax(dim=-1)
    return head_outputs(module, weights @ parts.value)[:, list(heads), 0]


def through_last_norm(norm: nn.Module, token: Tensor, terms: Tensor) -> Tensor:
    """Residual terms (B,...,W) behind the last norm, as parts of its output for the token (B,W) they belong to."""
    assert isinstance(norm, nn.LayerNorm)
    shape = (-1, *[1] * (terms.ndim - 1))
    centred = terms - terms.mean(dim=-1, keepdim=True)
    return centred * norm.weight / _deviation(norm, token).view(shape)


def class_token_tower(encoder: DualEncoder) -> VisionTower:
    """The vision tower of an encoder whose image feature is its class token after the last norm.

    Raises:
        ModelError: it pools otherwise, or has no way in.
    """
    tower = encoder.vision_tower
    visual = getattr(getattr(encoder, "model", None), "visual", None)
    if tower.project is None or getattr(visual, "pool_type", "tok") != "tok":
        raise ModelError(
            "This vision tower does not read its feature off the class token after the last norm, which the "
            "decomposition needs. Take a CLIP ViT, e.g. open_clip:ViT-B-16/openai."
        )
    return tower


def _last_norm(encoder: DualEncoder, tower: VisionTower, token: Tensor) -> _LastNorm:
    untyped: Any = encoder
    visual = untyped.model.visual
    norm, projection = visual.ln_post, visual.proj
    assert isinstance(norm, nn.LayerNorm) and isinstance(projection, Tensor)
    deviation = _deviation(norm, token)
    length = tower.finish(token[:, None]).norm(dim=-1)
    return _LastNorm(norm.weight, norm.bias, deviation, projection, length)


def _deviation(norm: nn.LayerNorm, token: Tensor) -> Tensor:
    """(B,) what the norm divides by."""
    return (token.var(dim=-1, unbiased=False) + norm.eps).sqrt()
