"""Which captions of an image a batch uses, and their token ids.

An image may have several captions. Each epoch takes up to `captions_per_image` of them without replacement, drawn anew
from (seed, epoch, sample); an image with fewer captions brings all it has, so the number
of texts per image is ragged (`text_to_image` in the batch says whose a text is).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vlkit.data.randomness import fleeting_generator


@runtime_checkable
class Tokenizer(Protocol):
    """What the loader asks of a tokenizer; `vlkit.models.tokenizers.TextTokenizer` is one."""

    tokenizer_id: str  # token ids stored in shards under this name are used instead of tokenizing
    context_length: int

    def encode_ragged(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, no padding, cut to the context length."""

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Ragged ids to (R,T) int64, cut to the context and padded on the right."""


@runtime_checkable
class WholeTokenizer(Protocol):
    """A tokenizer that can also say how long a text is when it is not cut."""

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, no padding, not cut."""


class Text(NamedTuple):
    """A caption, with its token ids if they are stored."""

    text: str
    tokens: list[int] | None


class FunctionTokenizer:
    """A plain function `list of texts -> (R, context_length)`, padded with 0 on the right, as a `Tokenizer`.

    Args:
        function: e.g. an open_clip tokenizer; it must be picklable if it is to run in worker processes.
        tokenizer_id: name of stored token ids that may be used instead; "" for none.
        full_context: keep the padding up to the context length, for towers that look at it.
    """

    def __init__(self, function: Callable[[list[str]], Tensor], tokenizer_id: str = "", full_context: bool = False):
        self.function = function
        self.tokenizer_id = tokenizer_id
        self.full_context = full_context
        self.context_length = int(function([""]).shape[1])

    def encode_ragged(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without the padding."""
        tokens = self.function(list(texts))
        lengths = ((tokens != 0) * torch.arange(1, tokens.shape[1] + 1)).amax(1)
        return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(R,T) int64; T is the longest row, or the context length with `full_context`."""
        longest = self.context_length if self.full_context else max(map(len, rows), default=0)
        tokens = torch.zeros(len(rows), min(longest, self.context_length), dtype=torch.int64)
        for i, row in enumerate(rows):
            row = row if len(row) <= self.context_length else [*row[: self.context_length - 1], row[-1]]
            tokens[i, : len(row)] = torch.as_tensor(row)
        return tokens


def choose_captions(count: int, wanted: int, *, seed: int, epoch: int, sample_id: int) -> list[int]:
    """Positions of the captions to use, out of `count`: `wanted` different ones, in their order if that is all.

    Args:
        count: captions the image has.
        wanted: captions the batch should hold of it.
        seed, epoch, sample_id: see `randomness.generator`.
    """
    if count <= wanted:
        return list(range(count))
    draws = fleeting_generator(seed, epoch, sample_id, "captions").random(count)
    return [int(i) for i in np.argsort(draws, kind="stable")[:wanted]]


def drop_tokens(tokens: Sequence[int], rate: float, random: np.random.Generator) -> list[int]:
    """Leave out each token with probability `rate`, but for the first and the last (start and end of the text).

    A text of which nothing would be left keeps one token between them, so that it still says something.

    Source: Li et al. 2023, "An Inverse Scaling Law for CLIP Training" (CLIPA), arXiv:2305.07017, section 3.2
        (random text masking).
    Differs: a fixed rate instead of a fixed number of tokens kept.
    """
    inner = len(tokens) - 2
    if inner < 1:
        return list(tokens)
    draws = random.random(inner)
    kept = draws >= rate
    kept[int(draws.argmax())] = True
    return [tokens[0], *(token for token, keep in zip(tokens[1:-1], kept, strict=True) if keep), tokens[-1]]


def caption_hash(text: str) -> int:
    """A signed 64-bit number: equal for equal strings in any process, different for different ones."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
