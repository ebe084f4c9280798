"""Texts that begin alike, through a causal text tower: what they have in common is computed once for all of them.

    shared = SharedPrefix.of(tower, tokens)          # None where that is not exact
    shared.features(prefix, rest)                    # prefix (L,P,W), rest (R,S,W) -> (L,R,D)

In a causal tower a position sees nothing behind it. So the start token and the learned words in front of the class
names come out the same for every class: they run once, and the few tokens behind them attend to them. Of the last block
nothing but the end token is computed. The values are those of whole texts up to rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlkit.models.attention import (
    attention_logits,
    attention_map,
    attention_parts,
    feed_forward,
    join_heads,
    mix_values,
)
from vlkit.models.tower import Block, TextTower

# On a CPU texts that differ in length go through in so many groups, each up to its own longest, from so many texts on;
# a GPU would wait for small launches.
GROUPS, WORTH_GROUPING = 4, 64
# Prefixes x texts that go through together where no gradient is wanted.
PAIRS_AT_ONCE = 8192


class _Seen(NamedTuple):
    """What a block shows of the prefixes to the positions behind them."""

    key: Tensor  # (L,H,P,E)
    value: Tensor  # (L,H,P,E)


@dataclass(frozen=True)
class SharedPrefix:
    """R texts of which the first tokens are the same.

    Attributes:
        tower: a causal one, of open_clip's blocks.
        length: P, tokens that all texts begin with.
        ends: (R,) where each text ends, counted behind the prefix.
        tokens: (R,S) what stands there.
    """

    tower: TextTower
    length: int
    ends: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, tower: TextTower, tokens: Tensor) -> Self | None:
        """For texts (R,T) padded behind their end token, which has the highest number; None where they do not begin
        alike, or where the tower's blocks, its mask or its pooling are of another kind."""
        ends = tokens.argmax(dim=1)
        same = (tokens == tokens[:1]).all(dim=0)
        length = min(int(same.long().cumprod(0).sum()), int(ends.min()))
        if len(tokens) < 2 or length < 2 or not _is_causal(tower, tokens) or not _reads_end(tower, tokens):
            return None
        return cls(tower, length, ends - length, tokens[:, length:])

    def features(self, prefix: Tensor, rest: Tensor, checkpointing: bool = False) -> Tensor:
        """(L,R,D), not unit norm.

        Args:
            prefix: (L,P,W) embedded, with positions.
            rest: (R,S,W) the same of what stands behind it.
            checkpointing: compute activations again in backward instead of keeping them.
        """
        seen = list(self._prefixes(prefix))
        order = self.ends.argsort(stable=True)
        groups = GROUPS if len(rest) >= WORTH_GROUPING and rest.device.type == "cpu" else 1
        if not torch.is_grad_enabled():
            groups = max(groups, math.ceil(len(prefix) * len(rest) / PAIRS_AT_ONCE))
        made = []
        for rows in order.chunk(groups):
            size = int(self.ends[rows].max()) + 1 if groups > 1 else rest.shape[1]
            x = rest[rows, :size].expand(len(prefix), -1, -1, -1)
            made.append(self._behind(x, seen, self.ends[rows], rows, checkpointing))
        return torch.cat(made, dim=1)[:, order.argsort()]

    def _prefixes(self, x: Tensor) -> Iterator[_Seen]:
        last = len(self.tower.blocks) - 1
        for layer, block in enumerate(self.tower.blocks):
            parts = attention_parts(block.module, x)
            yield _Seen(parts.key, parts.value)
            if layer < last:
                x = x + mix_values(block.module, attention_map(parts, block.mask(x)), parts.value)
                x = x + feed_forward(block.module, x)

    def _behind(self, x: Tensor, seen: list[_Seen], ends: Tensor, rows: Tensor, checkpointing: bool) -> Tensor:
        """(L,r,D) of some texts (L,r,s,W)."""
        again = checkpointing and torch.is_grad_enabled()
        for block, before in zip(self.tower.blocks[:-1], seen[:-1], strict=True):
            x = checkpoint(_through, block, x, before, use_reentrant=False) if again else _through(block, x, before)
        x = _through(self.tower.blocks[-1], x, seen[-1], ends)
        tokens = self.tokens[rows].gather(1, ends[:, None]).repeat(len(x), 1)
        out: Tensor = self.tower.finish(x.flatten(0, 1), tokens).unflatten(0, x.shape[:2])
        return out


def _through(block: Block, x: Tensor, before: _Seen, ends: Tensor | None = None) -> Tensor:
    """(L,r,s,W) through a block, behind prefixes; with `ends` (r,) of these positions alone, (L,r,1,W)."""
    shape, module = x.shape[:2], block.module
    flat = x.flatten(0, 1)
    parts, mask = attention_parts(module, flat), block.mask(flat)
    assert mask is not None, "the tower is causal"
    query = parts.query
    if ends is not None:
        rows = torch.arange(len(flat), device=x.device), ends.repeat(shape[0])
        flat, query = flat[rows][:, None], query.transpose(1, 2)[rows][:, :, None]
        mask = mask[rows[1]][:, None, None]
    own = attention_logits(query, parts.key, mask)  # (L r,H,q,s)
    # One product for all texts of a prefix: its keys are not copied for each.
    together = _by_prefix(query, shape) @ before.key.mT * query.shape[-1] ** -0.5
    weights = torch.cat([_by_text(together, shape), own], dim=-1).softmax(dim=-1)
    early, late = weights.split([before.key.shape[2], own.shape[-1]], dim=-1)
    mixed = late @ parts.value + _by_text(_by_prefix(early, shape) @ before.value, shape)
    flat = flat + join_heads(module, mixed)
    out: Tensor = (flat + feed_forward(module, flat)).unflatten(0, shape)
    return out


def _by_prefix(x: Tensor, shape: torch.Size) -> Tensor:
    """(L r,H,q,E) -> (L,H,r q,E)."""
    out: Tensor = x.unflatten(0, shape).transpose(1, 2).flatten(2, 3)
    return out


def _by_text(x: Tensor, shape: torch.Size) -> Tensor:
    """(L,H,r q,E) -> (L r,H,q,E)."""
    out: Tensor = x.unflatten(2, (shape[1], -1)).transpose(1, 2).flatten(0, 1)
    return out


def _is_causal(tower: TextTower, tokens: Tensor) -> bool:
    """Whether all blocks are open_clip's own, under a mask that hides what comes later."""
    count = tokens.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=tokens.device).triu(1)
    masks = [block.mask(tokens[:, :, None].float()) for block in tower.blocks]
    plain = all(type(block.module).__name__ == "ResidualAttentionBlock" for block in tower.blocks)
    return plain and all(mask is not None and bool((mask == -torch.inf).equal(later)) for mask in masks)


def _reads_end(tower: TextTower, tokens: Tensor) -> bool:
    """Whether pooling takes the end token, wherever it stands."""
    with torch.no_grad():
        x = tower.embed(tokens[:1])
        x, row = torch.cat([x, x[:, :1]], dim=1), torch.cat([tokens[:1], torch.zeros_like(tokens[:1, :1])], dim=1)
        end = int(row.argmax())
        return torch.allclose(tower.finish(x, row), tower.finish(x[:, end : end + 1], row[:, end : end + 1]))
