"""open_clip's own text and vision transformers, taken apart into towers.

Only names that the published weights fix are used (conv1, ln_post, resblocks, ...), none of open_clip's private
methods, so that a new release changes nothing here. What is no such transformer has no tower; `describe` says what
it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.models.tower import Block, TextTower, VisionTower

# Poolings that read one position at or before the end token: with a causal mask nothing after it matters.
_POOLS_UP_TO_END = ("argmax", "eos", "first")
_KINDS = {
    "TimmModel": "a timm model",
    "ModifiedResNet": "a ResNet",
    "VisionTransformer": "an attention-pooled ViT",
    "HFTextEncoder": "a Hugging Face model",
    "TextTransformer": "a transformer with a class token (CoCa)",
}


def describe(tower: nn.Module) -> str:
    """What a tower without a way in is, for messages."""
    return _KINDS.get(type(tower).__name__, f"a {type(tower).__name__}")


def gives(vision: nn.Module, text: nn.Module) -> frozenset[str]:
    """What a pair of open_clip towers can give besides image and text features."""
    names: set[str] = set()
    if has_vision_tower(vision):
        names |= {"vision_tower", "patch_tokens"} | (set() if vision.final_ln_after_pool else {"patches"})
    if has_text_tower(text):
        names |= {"text_tower", "words"}
    return frozenset(names)


def has_vision_tower(vision: Any) -> bool:
    """Whether this is open_clip's own ViT, pooled by class token or mean."""
    return (
        type(vision).__name__ == "VisionTransformer"
        and vision.attn_pool is None
        and vision.pool_type in ("tok", "avg")
        and vision.transformer.batch_first
    )


def has_text_tower(text: Any) -> bool:
    """Whether this is open_clip's own text transformer without a class token or padding mask."""
    return (
        type(text).__name__ == "TextTransformer"
        and text.cls_emb is None
        and not text.use_pad_mask
        and text.pool_type in (*_POOLS_UP_TO_END, "last")
        and text.transformer.batch_first
    )


def stops_at_end(text: Any) -> bool:
    """Whether positions after a text's end token cannot change its features, so that they may be left out."""
    return has_text_tower(text) and text.attn_mask is not None and text.pool_type in _POOLS_UP_TO_END


def end_positions(text: Any, tokens: Tensor) -> Tensor:
    """The position (R,) that pooling reads in each text of tokens (R,T)."""
    if text.pool_type == "first":
        return torch.zeros_like(tokens[:, 0])
    if text.pool_type == "last":
        return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
    if text.pool_type == "eos":
        is_end: Tensor = tokens == text.eos_id
        return is_end.int().argmax(dim=-1)
    return tokens.argmax(dim=-1)  # the end token has the highest id


def vision_tower(vision: Any, pixels: Callable[[Tensor], Tensor]) -> VisionTower:
    """The stages of a ViT; `pixels` applies mean and std."""
    norm_last = bool(vision.final_ln_after_pool)

    def embed(images: Tensor) -> Tensor:
        grid = vision.conv1(pixels(images))
        x = grid.flatten(2).transpose(1, 2)  # (B,P,W)
        first = vision.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        # (x.shape[0] and not len(x), which would fix the batch size of an exported graph.)
        x = torch.cat([first, x], dim=1) + _positions(vision, grid.shape[2], grid.shape[3]).to(x.dtype)
        out: Tensor = vision.ln_pre(vision.patch_dropout(x))
        return out

    def finish(x: Tensor) -> Tensor:
        x = x if norm_last else vision.ln_post(x)
        pooled = x[:, 1:].mean(dim=1) if vision.pool_type == "avg" else x[:, 0]
        out: Tensor = (vision.ln_post(pooled) if norm_last else pooled) @ vision.proj
        return out

    def patches(x: Tensor) -> Tensor:
        out: Tensor = x if norm_last else vision.ln_post(x)
        return out[:, 1:]

    return VisionTower(
        embed=embed,
        blocks=_blocks(vision.transformer, lambda x: None),
        finish=finish,
        grid=(int(vision.grid_size[0]), int(vision.grid_size[1])),
        patches=patches,
        # A norm after the mean is no map of single patches.
        project=None if norm_last else lambda tokens: tokens @ vision.proj,
        last_of_class=_class_through(vision.transformer.resblocks[-1]) if _needs_class_alone(vision) else None,
    )


def _needs_class_alone(vision: Any) -> bool:
    """Whether the last block may leave out all positions but the one that pooling reads: 7% of a ViT-B's work.

    Only of rounded weights, where speed is what was asked for: fp32 features equal those of the stages to the bit. And
    not where an add-on has changed something there.
    """
    block = vision.transformer.resblocks[-1]
    if vision.pool_type != "tok" or torch.is_grad_enabled() or type(block).__name__ != "ResidualAttentionBlock":
        return False
    changed = any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        for part in (block, block.attn, block.mlp, vision.ln_post)
    )
    return block.attn.out_proj.weight.dtype == torch.bfloat16 and not changed


def _class_through(block: Any) -> Callable[[Tensor], Tensor]:
    """A residual block of which only the first position is computed: x (B,L,W) -> (B,1,W)."""
    attn = block.attn

    def through(x: Tensor) -> Tensor:
        width, normed = x.shape[-1], block.ln_1(x)
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        query = F.linear(normed[:, :1], weight[:width], bias[:width])
        key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
        heads = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        out = x[:, :1] + block.ls_1(attn.out_proj(mixed))
        first: Tensor = out + block.ls_2(block.mlp(block.ln_2(out)))
        return first

    return through


def _positions(vision: Any, height: int, width: int) -> Tensor:
    """The position embeddings (1+P,W); for images of another size resized as open_clip resizes those it loads."""
    table: Tensor = vision.positional_embedding
    rows, columns = int(vision.grid_size[0]), int(vision.grid_size[1])
    if (height, width) == (rows, columns):
        return table
    image = table[1:].float().T.reshape(1, -1, rows, columns)
    image = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], image[0].flatten(1).T.to(table.dtype)])


def text_tower(text: Any) -> TextTower:
    """The stages of a text transformer, causal or not."""

    def token_vectors(tokens: Tensor) -> Tensor:
        # Not the blocks' own type: their matrices may be bf16 alone.
        x: Tensor = text.token_embedding(tokens).to(text.ln_final.weight.dtype)
        return x

    def embed(tokens: Tensor) -> Tensor:
        x = token_vectors(tokens)
        positions: Tensor = text.positional_embedding[: tokens.shape[1]]
        return x + positions.to(x.dtype)

    def mask(x: Tensor) -> Tensor | None:
        return None if text.attn_mask is None else _causal_mask(text.attn_mask, x.shape[1])

    def project(x: Tensor) -> Tensor:
        x = text.ln_final(x)
        matrix = text.text_projection
        if matrix is None:
            return x
        out: Tensor = matrix(x) if isinstance(matrix, nn.Module) else x @ matrix
        return out

    def finish(x: Tensor, tokens: Tensor) -> Tensor:
        # The norm works on each position alone, so it need not see those that pooling drops.
        return project(x[torch.arange(x.shape[0], device=x.device), end_positions(text, tokens)])

    def word_mask(tokens: Tensor) -> Tensor:
        if text.pool_type != "argmax":
            special = torch.tensor([text.pad_id, text.eos_id], device=tokens.device)
            return ~torch.isin(tokens, special)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return (positions > 0) & (positions < end_positions(text, tokens)[:, None])

    return TextTower(
        embed=embed,
        blocks=_blocks(text.transformer, mask),
        finish=finish,
        words=project,
        word_mask=word_mask,
        token_vectors=token_vectors,
    )


def _blocks(transformer: Any, mask: Callable[[Tensor], Tensor | None]) -> tuple[Block, ...]:
    recompute = bool(transformer.grad_checkpointing) and torch.is_grad_enabled()
    return tuple(Block(module, mask, recompute) for module in transformer.resblocks)


def _causal_mask(mask: Tensor, length: int) -> Tensor:
    if length <= len(mask):
        return mask[:length, :length]
    # Prompts made the sequence longer than the model was built for.
    return torch.full((length, length), float("-inf"), device=mask.device, dtype=mask.dtype).triu_(1)
