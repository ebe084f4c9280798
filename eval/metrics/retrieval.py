"""Image-text retrieval: the ranks of the right answers in both directions, in one pass over score tiles.

    from eval.metrics import retrieval_recall
    retrieval_recall(image, text, text_to_image)["text_to_image/recall@1"]

Neither the (M,N) score matrix nor a sorted list is ever made: a rank is a count of scores above the right
answer's, so memory is one tile and time is the matrix product.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor
from eval.metrics.ranking import Ranks, hit_probability, tie_bounds

# Scores (t,n) of a chunk of texts against a chunk of images, e.g. `PairScore.score`.
TileScore = Callable[[Tensor, Tensor], Tensor]

# A tile of 1024 x 1024 float32 stays in the processor's cache between the product and the four counts over
# it; tiles of 2048 x 2048 made the counts 25 times slower.
TILE = 1024
OWN_CHUNK = 256
# Words of eight bytes, each 0 or 1, that may be added before a byte overflows: at most 255.
_WORDS = 128


class RetrievalRanks(NamedTuple):
    """Ranks of both directions."""

    image_to_text: Ranks  # (N,): of an image's captions, the one that stands first among all M
    text_to_image: Ranks  # (M,): of a caption's image among all N


def retrieval_recall(
    image: Array,
    text: Array,
    text_to_image: Array,
    ks: Sequence[int] = (1, 5, 10),
    *,
    score: TileScore | None = None,
    tile: int = TILE,
) -> dict[str, float]:
    """Recall@K of image-text retrieval in both directions, all captions used.

    `text_to_image/recall@K`: the share of captions whose own image is among the first K of the N images.
    `image_to_text/recall@K`: the share of images with at least one of their captions among the first K of
    the M captions (a hit rate); an image without any caption is a miss. Ties as in `eval.metrics.ranking`:
    the expectation over their random order, so constant features give chance.

    Args:
        image: (N,D) unit-norm image features.
        text: (M,D) unit-norm caption features.
        text_to_image: (M,) int64, the image row each caption belongs to; any order, ragged counts.
        ks: numbers of results, each >= 1; they may exceed the gallery.
        score: scores of a tile; default the inner product.
        tile: rows and columns of one tile; changes memory and speed, not the result.

    Returns:
        `{direction}/recall@{K}` for every K and both directions: fractions.

    Raises:
        ValueError: shapes that do not fit, an index out of range, features that are not finite.

    Source: CLIP_benchmark 1.6.1, metrics/zeroshot_retrieval.py (same values where nothing ties).
    """
    ranks = retrieval_ranks(image, text, text_to_image, score=score, tile=tile)
    return {
        f"{direction}/recall@{k}": hit_probability(one_direction, k).mean().item()
        for direction, one_direction in ranks._asdict().items()
        for k in ks
    }


@torch.no_grad()
def retrieval_ranks(
    image: Array,
    text: Array,
    text_to_image: Array,
    *,
    score: TileScore | None = None,
    tile: int = TILE,
) -> RetrievalRanks:
    """The right answers' ranks in both directions; arguments and errors as in `retrieval_recall`."""
    image, text, text_to_image = as_tensor(image), as_tensor(text), as_tensor(text_to_image)
    _check(image, text, text_to_image, tile)
    text_to_image = text_to_image.to(image.device, torch.int64)
    if score is None:
        image, text = in_working_precision(image, text)
        score = _inner_product
    own = _own_scores(image, text, text_to_image, score)
    best, num_tied_own = _best_own(own, text_to_image, len(image))
    counts = _count_wrong(image, text, text_to_image, tie_bounds(own), tie_bounds(best), score, tile)
    (text_better, text_near), (image_better, image_near) = counts
    image_better[num_tied_own == 0] = len(text)
    image_near[num_tied_own == 0] = len(text)
    return RetrievalRanks(
        image_to_text=Ranks(image_better, image_near - image_better, num_tied_own),
        text_to_image=Ranks(text_better, text_near - text_better, torch.ones_like(text_better)),
    )


def _count_wrong(
    image: Tensor,
    text: Tensor,
    text_to_image: Tensor,
    text_bounds: tuple[Tensor, Tensor],
    image_bounds: tuple[Tensor, Tensor],
    score: TileScore,
    tile: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Per caption (M,) and per image (N,): how many wrong answers score above, and above or tied."""
    of_text = text_to_image.new_zeros(2, len(text))
    of_image = text_to_image.new_zeros(2, len(image))
    for top in range(0, len(text), tile):
        rows = slice(top, top + tile)
        own_image = text_to_image[rows]
        for left in range(0, len(image), tile):
            columns = slice(left, left + tile)
            scores = score(text[rows], image[columns])
            if score is not _inner_product:
                scores = scores.clone()  # a callback may hand out a view of something it keeps
            hit = ((own_image >= left) & (own_image < left + scores.shape[1])).nonzero().squeeze(1)
            scores[hit, own_image[hit] - left] = -torch.inf  # right answers never compete
            low, high = text_bounds[0][rows, None], text_bounds[1][rows, None]
            of_text[0, rows] += _count(scores > high, 1)
            of_text[1, rows] += _count(scores >= low, 1)
            low, high = image_bounds[0][columns], image_bounds[1][columns]
            of_image[0, columns] += _count(scores > high, 0)
            of_image[1, columns] += _count(scores >= low, 0)
    return (of_text[0], of_text[1]), (of_image[0], of_image[1])


def _count(mask: Tensor, dim: int) -> Tensor:
    """How many are set in a mask (t,n) along a dimension: `mask.sum(dim)`, six times faster on a CPU.

    Eight of its bytes are added at once as one int64; no byte overflows, because at most 128 words are added before
    they are taken apart again.
    """
    if mask.device.type != "cpu":
        return mask.sum(dim)
    short = -mask.shape[1] % 8
    words = (F.pad(mask, (0, short)) if short else mask.contiguous()).view(torch.int64)
    if dim == 0:
        parts = [part.sum(0) for part in words.split(_WORDS)]
        return torch.stack(parts).view(torch.uint8).sum(0)[: mask.shape[1]]
    parts = [part.sum(1) for part in words.split(_WORDS, dim=1)]
    return torch.stack(parts, dim=1).view(torch.uint8).sum(1)


def _own_scores(image: Tensor, text: Tensor, text_to_image: Tensor, score: TileScore) -> Tensor:
    """(M,) the score of every caption with its own image, through the same function as the tiles.

    Captions are taken in the order of their images, so a chunk of them needs few images and all chunks
    together a few per cent of the full product. The shapes differ from the tiles', hence the last bits may:
    the tie tolerance covers that, and right answers are taken out of the tiles by position.
    """
    order = text_to_image.argsort(stable=True)
    parts = []
    for chunk in torch.split(order, OWN_CHUNK):
        images, column = torch.unique_consecutive(text_to_image[chunk], return_inverse=True)
        scores = score(text[chunk], image[images])
        parts.append(scores.gather(1, column[:, None]).squeeze(1))
    in_image_order = torch.cat(parts)
    return torch.empty_like(in_image_order).scatter_(0, order, in_image_order)


def _best_own(own: Tensor, text_to_image: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Per image (N,): the best score among its captions, and how many of them tie with it (0: no caption)."""
    best = own.new_full((num_images,), -torch.inf).scatter_reduce_(0, text_to_image, own, "amax")
    best[best.isneginf()] = 0.0  # no caption: any finite number, the caller overrides the counts
    low, _ = tie_bounds(best)
    tied = (own >= low[text_to_image]).to(torch.int64)
    return best, torch.zeros_like(text_to_image[:1]).expand(num_images).clone().scatter_add_(0, text_to_image, tied)


def in_working_precision(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """float32 for unit vectors, whose products err by 1e-7; float64 for longer ones, which err by more than a tie."""
    image, text = image.float(), text.float()
    longest = torch.stack([image.norm(dim=1).max(), text.norm(dim=1).max()]).max()
    return (image, text) if longest < 1.01 else (image.double(), text.double())


def _inner_product(text: Tensor, image: Tensor) -> Tensor:
    return text @ image.T


def _check(image: Tensor, text: Tensor, text_to_image: Tensor, tile: int) -> None:
    if image.shape[1:] != text.shape[1:] or image.ndim < 2 or text_to_image.shape != text.shape[:1]:
        raise ValueError(
            f"image is {tuple(image.shape)}, text {tuple(text.shape)}, text_to_image {tuple(text_to_image.shape)}; "
            "expected (N,D), (M,D) and (M,)."
        )
    if not len(image) or not len(text) or tile < 1:
        raise ValueError(f"{len(image)} images, {len(text)} texts, tile {tile}; expected at least 1 of each.")
    if text_to_image.is_floating_point() or text_to_image.min() < 0 or text_to_image.max() >= len(image):
        raise ValueError(f"text_to_image must hold integers from 0 to {len(image) - 1}.")
    for name, features in (("image", image), ("text", text)):
        # Two reductions instead of a mask as large as a quarter of the features.
        broken = ~(features.flatten(1).amax(1) - features.flatten(1).amin(1)).isfinite()
        if broken.any():
            raise ValueError(f"{name} features are not finite: {int(broken.sum())} rows.")
