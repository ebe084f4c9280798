"""Queries worth looking at: some answered right, some wrong, with what came first."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics import RetrievalRanks, expected_rank
from vlkit.data.records import Record
from vlkit.index.faiss_index import EmbeddingIndex


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
    of_images, of_texts = expected_rank(ranks.image_to_text), expected_rank(ranks.text_to_image)
    queries = _spread(of_images, num_examples)
    for query, nearest in zip(queries, _nearest(image[queries], text, num_found), strict=True):
        found = tuple(
            Found(records[int(owners[row])], captions[row], score, int(owners[row]) == query) for row, score in nearest
        )
        examples.append(RetrievalExample("image_to_text", records[query], None, of_images[query].item(), found))
    queries = _spread(of_texts, num_examples)
    for query, nearest in zip(queries, _nearest(text[queries], image, num_found), strict=True):
        own = int(owners[query])
        found = tuple(Found(records[row], None, score, row == own) for row, score in nearest)
        examples.append(RetrievalExample("text_to_image", records[own], captions[query], of_texts[query].item(), found))
    return tuple(examples)


def _nearest(queries: Tensor, gallery: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """Of each query the k nearest of a gallery, row and score, best first."""
    if not len(queries):
        return []
    index = EmbeddingIndex.build(gallery, [str(row) for row in range(len(gallery))], "flat")
    scores, ids = index.search(queries, k)
    return [
        [(int(row), score) for row, score in zip(of_query, own, strict=True)]
        for of_query, own in zip(ids, scores.tolist(), strict=True)
    ]


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
