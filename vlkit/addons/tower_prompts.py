"""Vectors of one's own among the tokens of a tower, in front of its first blocks; everything is put back.

    with image_prompts(encoder, prompts):               # (J,n,W): n behind the patches in front of blocks 0..J-1
        encoder.encode_image(images)
    with text_prompts(encoder, prompts, "a photo of a"):      # in place of the first n of these words
        encoder.encode_text(tokens)                           # of texts that begin with them

In front of each block but the first the vectors take the place of what the block before made of them, so a tower has
n tokens more at the most, and those of a text stay as many as they are. What leaves the last block are the tower's own
tokens. Nothing is written into the model: the prompts come and go with hooks on its blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.prompted_text import word_ids
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tower import Block

Change = Callable[[Tensor], Tensor]
# Number of a layer and the vectors (n,W) given for it -> its prompts (n,V).
OfLayer = Callable[[int, Tensor], Tensor]


@contextmanager
def image_prompts(encoder: DualEncoder, prompts: Tensor, through: OfLayer | None = None) -> Iterator[None]:
    """Within it the vision tower has prompts behind its patches.

    Args:
        encoder: with a way into its vision tower.
        prompts: (J,n,W), of the first J blocks; none where J or n is 0.
        through: makes a layer's prompts of these, anew in each pass, so that each has a graph of its own.

    Raises:
        ModelError: a vision tower without a way in.
        ConfigError: more layers, or another width, than the tower's.
    """
    blocks = encoder.vision_tower.blocks
    depth, count = prompts.shape[:2]
    if not prompts.numel():
        yield
        return

    def of(layer: int) -> Tensor:
        return prompts[layer] if through is None else through(layer, prompts[layer])

    with torch.no_grad():
        _check("vision", depth, of(0).shape[1], blocks)

    def enter(x: Tensor) -> Tensor:
        return torch.cat([x, _like(of(0), x)], dim=1)

    def again(layer: int) -> Change:
        return lambda x: torch.cat([x[:, :-count], _like(of(layer), x)], dim=1)

    with ExitStack() as stack:
        for layer in range(depth):
            stack.enter_context(before(blocks[layer], again(layer) if layer else enter))
        stack.enter_context(after(blocks[-1], lambda x: x[:, :-count]))
        yield


@contextmanager
def text_prompts(encoder: DualEncoder, prompts: Tensor, words: str) -> Iterator[None]:
    """Within it the text tower has prompts in place of the first words of a text.

    Args:
        encoder: with a way into its text tower.
        prompts: (J,n,W), of the first J blocks; those of the first hold the place's position embedding too.
        words: all texts begin with them; at least n tokens.

    Raises:
        ModelError: a text tower without a way in.
        ConfigError: more layers, or another width, than the tower's; or, when a text goes through, one that begins
            otherwise.
    """
    blocks = encoder.text_tower.blocks
    depth, count = prompts.shape[:2]
    if not prompts.numel():
        yield
        return
    _check("text", depth, prompts.shape[2], blocks)
    own = first_words(encoder, words, count)

    def enter(x: Tensor) -> Tensor:
        found = x[:, 1 : 1 + count]
        if not torch.equal(found, own.to(found).expand(len(x), -1, -1)):
            raise ConfigError(
                f"These prompts were learned in place of the words {words!r}, but a text begins otherwise. Use the "
                f"template {words + ' {}.'!r} that belongs to them, and no other class weights."
            )
        return replaced(0)(x)

    def replaced(layer: int) -> Change:
        return lambda x: torch.cat([x[:, :1], _like(prompts[layer], x), x[:, 1 + count :]], dim=1)

    with ExitStack() as stack:
        for layer in range(depth):
            stack.enter_context(before(blocks[layer], replaced(layer) if layer else enter))
        yield


def first_words(encoder: DualEncoder, words: str, count: int) -> Tensor:
    """(n,W) the first n tokens of some words as they reach the first block.

    Raises:
        ConfigError: the words have fewer tokens.
    """
    ids = word_ids(encoder, words)
    if len(ids) < count:
        raise ConfigError(
            f"{count} prompt vectors are to take the place of words, but {words!r} has {len(ids)} tokens. Lower "
            "text_tokens, or give more words."
        )
    tokens = encoder.tokenize([words]).to(encoder.device)
    with torch.inference_mode(False), torch.no_grad():
        found: Tensor = encoder.text_tower.embed(tokens)[0, 1 : 1 + count].clone()
    return found


def stock_image_features(encoder: DualEncoder, images: Tensor) -> Tensor:
    """(B,D) unit norm of the tower without what hooks do to it, also while they are on."""
    tower = encoder.vision_tower
    x = tower.embed(images)
    for block in tower.blocks:
        module: Any = block.module
        x = module.forward(x, attn_mask=block.mask(x))  # the method itself: hooks act on calls of the module only
    return F.normalize(tower.finish(x), dim=-1)


@contextmanager
def before(block: Block, change: Change) -> Iterator[None]:
    """Within it a block gets something else than what reaches it."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    handle = block.module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(block: Block, change: Change) -> Iterator[None]:
    """Within it something else leaves a block than what it makes."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        return change(out)

    handle = block.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def layers(depth: int, blocks: Sequence[Block], who: str) -> int:
    """How many blocks get prompts where `depth` are asked for: all of a tower that has fewer.

    Raises:
        ConfigError: fewer than one.
    """
    if depth < 1:
        raise ConfigError(f"{who}: depth is {depth}; prompts stand in front of at least one layer.")
    return min(depth, len(blocks))


def width(blocks: Sequence[Block]) -> int:
    """W of a tower."""
    module: Any = blocks[0].module
    return int(module.ln_1.weight.shape[0])


def _check(side: str, depth: int, wide: int, blocks: Sequence[Block]) -> None:
    if depth > len(blocks) or wide != width(blocks):
        raise ConfigError(
            f"Prompts for {depth} layers of width {wide} do not fit this {side} tower of {len(blocks)} layers of width "
            f"{width(blocks)}. Fit them for this model."
        )


def _like(prompts: Tensor, x: Tensor) -> Tensor:
    """(n,W) for each item of x, in its type."""
    return prompts.to(device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
