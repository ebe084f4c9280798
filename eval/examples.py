"""Queries worth looking at: some answered right, some wrong, with what came first."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics import RetrievalRanks, expected_rank
from vlkit.data.records import Record


class Found(NamedTuple):
    """One result of a query."""

    record: Record
    caption: str | None  # the text found; None when an image was looked for
    score: float
    right: bool


class HeatExample(NamedTuple):
    """One image with what a method saw in it."""

    record: Record
    text: str  # what was looked for
    values: tuple[tuple[float, ...], ...]  # a grid over the whole image, each within 0 and 1
    note: str


class RetrievalExample(NamedTuple):
    """One query with its first results."""

    direction: str  # "image_to_text" or "text_to_image"
    record: Record  # the query image, or the image the query caption belongs to
    caption: str | None  # the query caption; None when the query is an image
    rank: float  # of the right answer
    found: tuple[Found, ...]


def choose_examples(
    records: Sequence[Record],
    image: Tensor,
    text: Tensor,
    owners: Tensor,
    ranks: RetrievalRanks,
    num_examples: int,
    num_found: int = 5,
) -> tuple[RetrievalExample, ...]:
    """For each direction up to `num_examples` queries, half right and half wrong, spread over the set.

    Args:
        records: (N,) of the images.
        image: (N,D) features.
        text: (M,D) features of all captions, image by image.
        owners: (M,) the image row of each caption.
        ranks: of both directions.
        num_examples: queries of each direction.
        num_found: results of each query.
    """
    captions = [caption for record in records for caption in record.captions]
    examples = []
    for query in _spread(expected_rank(ranks.image_to_text), num_examples):
        scores, best = (text @ image[query]).topk(min(num_found, len(text)))
        found = tuple(
            Found(records[int(owners[row])], captions[row], score, int(owners[row]) == query)
            for score, row in zip(scores.tolist(), best.tolist(), strict=True)
        )
        rank = expected_rank(ranks.image_to_text)[query].item()
        examples.append(RetrievalExample("image_to_text", records[query], None, rank, found))
    for query in _spread(expected_rank(ranks.text_to_image), num_examples):
        own = int(owners[query])
        scores, best = (image @ text[query]).topk(min(num_found, len(image)))
        found = tuple(
            Found(records[row], None, score, row == own)
            for score, row in zip(scores.tolist(), best.tolist(), strict=True)
        )
        rank = expected_rank(ranks.text_to_image)[query].item()
        examples.append(RetrievalExample("text_to_image", records[own], captions[query], rank, found))
    return tuple(examples)


def _spread(rank: Tensor, count: int) -> list[int]:
    """Up to `count` rows at even distances: half with the right answer first, half without, as far as there are."""
    right, wrong = (rank <= 1).nonzero().flatten(), (rank > 1).nonzero().flatten()
    num_right = min(len(right), max(count - count // 2, count - len(wrong)))
    num_wrong = min(len(wrong), count - num_right)
    return _even(right, num_right) + _even(wrong, num_wrong)


def _even(rows: Tensor, count: int) -> list[int]:
    if not count:
        return []
    chosen: list[int] = rows[torch.linspace(0, len(rows) - 1, count).round().long()].tolist()
    return chosen
