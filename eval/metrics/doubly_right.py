"""Doubly right recognition: how often both the class and the reason for it are right.

    found = doubly_right(scores, candidates, labels, reasons)
    found.both, found.only_class, found.only_reason, found.neither

Source: Mao et al. 2023, "Doubly Right Object Recognition: A Why Prompt for Visual Rationales", CVPR, arXiv:2212.06202,
section 3, and the authors' code: candidates are all pairs of class and reason, 5 are looked at.
Differs: classes and reasons are compared by number, not as parts of strings, and all five candidates vote, where the
authors' loop stops at the first hit. Equal scores stand in random order, drawn by seed for each image.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor
from vlkit.errors import DataError

# Scores at a time: 256 images x 46,200 candidates are 47 MB.
_CHUNK = 256


class Candidates(NamedTuple):
    """T pairs of a class and a reason."""

    classes: Tensor  # (T,) int64
    reasons: Tensor  # (T,) int64


class DoublyRight(NamedTuple):
    """Shares of the images; they sum to 1."""

    both: float  # class and reason right: RR, the doubly right accuracy
    only_class: float  # RW: right for another reason
    only_reason: float  # WR: another class, with the image's reason
    neither: float  # WW


class Judged(NamedTuple):
    """Each image."""

    right: Tensor  # (n,) bool: the class
    reasoned: Tensor  # (n,) bool: the reason, with the class chosen


def doubly_right(
    scores: Array, candidates: Candidates, labels: Array, reasons: Array, k: int = 5, seed: int = 0
) -> DoublyRight:
    """Rates over images; see `judged`."""
    right, reasoned = judged(scores, candidates, labels, reasons, k, seed)
    pairs = (right & reasoned, right & ~reasoned, ~right & reasoned, ~right & ~reasoned)
    return DoublyRight(*(one.double().mean().item() for one in pairs))


def judged(scores: Array, candidates: Candidates, labels: Array, reasons: Array, k: int = 5, seed: int = 0) -> Judged:
    """Whether class and reason are right.

    The k best candidates of an image vote for the class; of classes with equally many, the one whose candidate comes
    first wins. The reason is right if one of the k joins it with the true class (or, where the class is wrong, with
    the class chosen).

    Args:
        scores: (n,T) of images and candidates.
        candidates: what the columns stand for.
        labels: (n,) true classes.
        reasons: (n,) each image's own reason.
        k: candidates looked at; more than there are: all.
        seed: of the order of equal scores.

    Raises:
        DataError: sizes that do not go together, or no image.
    """
    scores, labels, reasons = as_tensor(scores), as_tensor(labels), as_tensor(reasons)
    sizes = {len(labels), len(reasons), len(scores)}
    if len(sizes) > 1 or not len(scores) or scores.shape[1] != len(candidates.classes):
        raise DataError(
            f"Scores are {tuple(scores.shape)} for {len(labels)} labels, {len(reasons)} reasons and "
            f"{len(candidates.classes)} candidates; expected (images, candidates) of at least one image."
        )
    right, reasoned = torch.zeros(2, len(scores), dtype=torch.bool)
    for rows, best in _best(scores, k, seed):
        classes, given = candidates.classes[best], candidates.reasons[best]
        chosen = _vote(classes)
        right[rows] = chosen == labels[rows]
        reasoned[rows] = ((classes == chosen[:, None]) & (given == reasons[rows, None])).any(1)
    return Judged(right, reasoned)


def _best(scores: Tensor, k: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The k best candidates (b,k) of some images at a time, best first."""
    random = torch.Generator().manual_seed(seed)
    for start in range(0, len(scores), _CHUNK):
        part = scores[start : start + _CHUNK]
        order = torch.rand(part.shape, generator=random).argsort(1)
        ranked = part.gather(1, order).sort(dim=1, descending=True, stable=True).indices[:, :k]
        yield slice(start, start + len(part)), order.gather(1, ranked)


def _vote(classes: Tensor) -> Tensor:
    """(b,) the most frequent of (b,k) classes, the first of those in case of a tie."""
    votes = (classes[:, :, None] == classes[:, None]).sum(2)
    return classes.gather(1, votes.argmax(1, keepdim=True))[:, 0]
