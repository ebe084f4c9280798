"""The bank behind gallery biases: queries of another split, by kind, from which a bias of any gallery follows.

A gallery of images is asked for with texts, so its bias comes from the bank of captions; a gallery of texts or classes
comes from the bank of images. One fitted bias therefore serves both directions.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlkit.addons.exchange import Vectors
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference

# Gallery items whose similarities with the bank exist at a time.
CHUNK = 1024


def sampled(vectors: Vectors | None, size: int | None, seed: int, what: str) -> Tensor | None:
    """(m,D) `size` of the vectors by seed, or all; None where there are none.

    Raises:
        DataError: fewer than asked for.
    """
    if vectors is None or not len(vectors):
        return None
    if size is None:
        return vectors.pooled.clone()
    if len(vectors) < size:
        raise DataError(
            f"A bank of {size} {what} was asked for, but the reference holds {len(vectors)}. "
            "Give more, or lower bank_size."
        )
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
    return vectors.pooled[order[:size]]


def banks(reference: "Reference", size: int | None) -> tuple[Tensor | None, Tensor | None]:
    """The bank of images and that of texts.

    Raises:
        ConfigError: neither is there.
        DataError: fewer than asked for.
    """
    images = None if reference.images is None else reference.images.vectors
    texts = None if reference.captions is None else reference.captions.vectors
    found = (
        sampled(images, size, reference.seed, "unlabelled images"),
        sampled(texts, size, reference.seed, "captions"),
    )
    if found == (None, None):
        raise ConfigError(
            "A gallery bias needs a bank of queries: unlabelled_images (to search texts, to classify) or captions (to "
            "search images) of another split than the test split; --reference names them."
        )
    return found


def queries_for(gallery: Vectors, images: Tensor | None, texts: Tensor | None, who: str) -> Tensor:
    """The bank of the other kind than the gallery's.

    Raises:
        ConfigError: there is none.
    """
    bank = texts if gallery.kind == "image" else images
    if bank is None:
        lacking = "captions" if gallery.kind == "image" else "unlabelled_images"
        raise ConfigError(
            f"{who} was fitted without {lacking}, which a gallery of {gallery.kind}s needs as a bank. Fit it with them."
        )
    return bank


def in_chunks(gallery: Tensor, bank: Tensor) -> list[Tensor]:
    """Similarities (g,m) of some gallery items with the whole bank, at a time."""
    return [part @ bank.T for part in gallery.split(CHUNK)] if len(gallery) else []


def soft_maximum(gallery: Tensor, bank: Tensor, beta: float) -> Tensor:
    """(N,) (1 / beta) log mean_q exp(beta s(q, r)): between the mean (beta to 0) and the maximum (beta large).

    By log-sum-exp, so that no sharpness overflows.
    """
    parts = [torch.logsumexp(beta * part, dim=1) for part in in_chunks(gallery, bank)]
    return (torch.cat([gallery.new_empty(0), *parts]) - math.log(len(bank))) / beta
