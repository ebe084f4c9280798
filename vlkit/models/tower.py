"""The way into the towers: embed, blocks, finish.

Prompts, deep prompts, the last-block switch, LoRA and the decompositions get inside a tower through these two
types and nowhere else. Running the three stages in turn gives exactly what the tower gives as a whole:

    x = tower.embed(tokens)
    for block in tower.blocks:
        x = block(x)
    features = tower.finish(x, tokens)        # (R,D), not yet unit norm

A tower is a view on the encoder's own modules, made at each access: it copies no weights and holds no state.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Block:
    """One residual block with the attention mask it runs under.

    `module` is the encoder's own block, for whoever wants its weights. `mask(x)` gives the additive mask for
    the length x has now, so that prompts may change the length between blocks.
    """

    module: nn.Module
    mask: Callable[[Tensor], Tensor | None]
    recompute: bool = False  # drop activations in forward and compute them again in backward

    def __call__(self, x: Tensor) -> Tensor:
        """(B,L,W) -> (B,L,W)."""
        out: Tensor
        if self.recompute:
            out = checkpoint(self.module, x, attn_mask=self.mask(x), use_reentrant=False)
        else:
            out = self.module(x, attn_mask=self.mask(x))
        return out


@dataclass(frozen=True)
class TextTower:
    """A text tower in three stages."""

    embed: Callable[[Tensor], Tensor]  # tokens (R,T) -> (R,T,W), token and position embeddings added
    blocks: tuple[Block, ...]
    finish: Callable[[Tensor, Tensor], Tensor]  # x (R,T,W), tokens (R,T) -> (R,D)
    words: Callable[[Tensor], Tensor]  # x (R,T,W) after the blocks -> (R,T,D), every position in the joint space
    word_mask: Callable[[Tensor], Tensor]  # tokens (R,T) -> (R,T) bool: no start, end or padding
    token_vectors: Callable[[Tensor], Tensor]  # tokens (...) -> (...,W), what `embed` adds the positions to

    def run(self, tokens: Tensor) -> Tensor:
        """All three stages: tokens (R,T) -> (R,D), not unit norm."""
        return self.finish(self.through_blocks(tokens), tokens)

    def through_blocks(self, tokens: Tensor) -> Tensor:
        """The first two stages: tokens (R,T) -> (R,T,W)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class VisionTower:
    """A vision tower in three stages. x holds one class position, then the patches row by row."""

    embed: Callable[[Tensor], Tensor]  # images (B,3,H,W) uint8, or float in [0,1] -> (B,1+P,W)
    blocks: tuple[Block, ...]
    finish: Callable[[Tensor], Tensor]  # x (B,1+P,W) -> (B,D)
    grid: tuple[int, int]  # rows and columns of patches, P = rows x columns
    patches: Callable[[Tensor], Tensor]  # x (B,1+P,W) after the blocks -> (B,P,W) as the tower's own output norms them
    project: Callable[[Tensor], Tensor] | None  # (B,P,W) -> (B,P,D); None where no such map is the tower's own
    # x (B,1+P,W) before the last block -> (B,1,W) after it, where nothing but the class position is wanted of it.
    last_of_class: Callable[[Tensor], Tensor] | None = None

    def run(self, images: Tensor) -> Tensor:
        """All three stages: images (B,3,H,W) -> (B,D), not unit norm."""
        if self.last_of_class is None:
            return self.finish(self.through_blocks(images))
        return self.finish(self.last_of_class(self._through(self.blocks[:-1], images)))

    def through_blocks(self, images: Tensor) -> Tensor:
        """The first two stages: images (B,3,H,W) -> (B,1+P,W)."""
        return self._through(self.blocks, images)

    def _through(self, blocks: tuple[Block, ...], images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in blocks:
            x = block(x)
        return x
