"""Attention relevance: which patches, and which words, decide over the similarity of an image and a text.

    image_relevance(encoder, images, text_features)      # (B,rows,columns)
    text_relevance(encoder, tokens, image_features)      # (B,T)

Source: Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", ICCV, arXiv:2103.15679; its CLIP notebook, which starts at the last layer by default.
Differs: None in the arithmetic. Gradients are taken with respect to the maps alone, so no weight needs one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.interpret.last_layers import first_of_last
from vlkit.models.attention import attention_map, attention_parts, feed_forward, mix_values
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.open_clip_towers import end_positions
from vlkit.models.tower import Block


def image_relevance(encoder: DualEncoder, images: Tensor, text: Tensor, last_layers: int = 1) -> Tensor:
    """Relevance of each patch for the similarity of image b with text b.

    Args:
        encoder: with an open_clip ViT.
        images: (B,3,S,S) uint8, or float in [0,1].
        text: (B,D) unit-norm text features.
        last_layers: how many layers the recursion runs through, from the end.

    Returns:
        (B,rows,columns), at least 0.

    Raises:
        ModelError: the encoder has no way into its vision tower.
        ConfigError: more layers than there are.
    """
    tower = encoder.vision_tower
    relevance = _relevance(
        tower.blocks, lambda: tower.embed(images), tower.finish, text, first_of_last(last_layers, tower.blocks)
    )
    maps: Tensor = relevance[:, 0, 1:].unflatten(-1, tower.grid)
    return maps


def text_relevance(encoder: DualEncoder, tokens: Tensor, image: Tensor, last_layers: int = 1) -> Tensor:
    """Relevance of each token for the similarity of text r with image r.

    Args:
        encoder: with open_clip's text transformer.
        tokens: (R,T).
        image: (R,D) unit-norm image features.
        last_layers: how many layers the recursion runs through, from the end.

    Returns:
        (R,T): the row of the position that is read; 0 outside the words.

    Raises:
        ModelError: the encoder has no way into its text tower.
        ConfigError: more layers than there are.
    """
    tower = encoder.text_tower
    relevance = _relevance(
        tower.blocks,
        lambda: tower.embed(tokens),
        lambda x: tower.finish(x, tokens),
        image,
        first_of_last(last_layers, tower.blocks),
    )
    untyped: Any = encoder
    ends = end_positions(untyped.model.text, tokens)
    row = relevance[torch.arange(len(tokens), device=tokens.device), ends]
    return row * tower.word_mask(tokens)


def _relevance(
    blocks: tuple[Block, ...],
    embed: Callable[[], Tensor],
    finish: Callable[[Tensor], Tensor],
    target: Tensor,
    start: int,
) -> Tensor:
    """(B,L,L): R = I, then R <- R + mean over heads of max(0, gradient x map) times R, layer by layer."""
    with torch.no_grad():
        x = embed()
        for block in blocks[:start]:
            x = block(x)
    maps = []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        for block in blocks[start:]:
            parts = attention_parts(block.module, x)
            weights = attention_map(parts, block.mask(x))
            maps.append(weights)
            x = x + mix_values(block.module, weights, parts.value)
            x = x + feed_forward(block.module, x)
        similarity = (F.normalize(finish(x), dim=-1) * target).sum()
        gradients = torch.autograd.grad(similarity, maps)
    relevance = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
    for weights, gradient in zip(maps, gradients, strict=True):
        step = (gradient * weights.detach()).clamp(min=0).mean(dim=1)
        relevance = relevance + step @ relevance
    return relevance
