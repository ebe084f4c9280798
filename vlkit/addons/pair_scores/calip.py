"""CALIP: patches and class texts attend to each other, without parameters, and both results are scored too.

    A = 2 F T^T;   T' = softmax_patches(A)^T F;   V = softmax_classes(A) T;   v = mean_p V + max_p V
    score = x T^T + beta_text x T'^T + beta_image v T^T

F: patches, T: class vectors, x: the pooled feature, all unit norm (T', V and v are not brought to unit norm again).

Source: Guo et al. 2023, "CALIP: Zero-Shot Enhancement of CLIP with Parameter-free Attention", AAAI, arXiv:2209.14169,
and the authors' code, which searches both betas on a grid of 200 x 200 on the test set.
Differs: The betas are chosen on validation images where there are any, on a grid of 0 and 15 more values each, and
stay at the given ones where there are none. A feature map changes x and T, but no patches. Classification alone: the
softmax over classes has no meaning over an open gallery.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vlkit.addons.base import Need, PairScoring, Task, Vectors
from vlkit.contracts import Progress
from vlkit.errors import ModelError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

_SHARPNESS = 2.0
# Without validation images.
DEFAULT_BETA = 0.1
# 0 is plain CLIP; from there to where the attended parts outweigh it.
_GRID = (0.0, *(0.01 * 1.6**step for step in range(15)))
# Images at a time: a matrix of patches and classes exists for each.
_ROWS = 64


class Parts(NamedTuple):
    """The three similarities of n images and r class vectors, (n,r) each."""

    plain: Tensor
    text: Tensor  # of the image with the texts that attended to its patches
    image: Tensor  # of the patches that attended to the texts, with the texts


@dataclass(frozen=True)
class Calip(PairScoring):
    """Parameter-free attention between patches and classes.

    Attributes:
        beta_text: weight of the attended texts; None: chosen on validation images, else 0.1.
        beta_image: weight of the attended patches; None: likewise.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"patches"})
    uses: ClassVar[frozenset[Need]] = frozenset({"val_labels", "class_names"})
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})

    beta_text: float | None = None
    beta_image: float | None = None

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Choose the betas that are not given."""
        given = (self.beta_text, self.beta_image)
        text, image = (DEFAULT_BETA if beta is None else beta for beta in given)
        if None in given and reference.val is not None and reference.weights is not None:
            text, image = self._chosen(reference)
        return replace(self, beta_text=text, beta_image=image)

    def score(self, queries: Vectors, gallery: Vectors) -> Tensor:
        """(q,g); one side is the images, with patches, the other the class vectors."""
        images, texts = (queries, gallery) if queries.kind == "image" else (gallery, queries)
        parts = attended(images, texts.pooled)
        assert self.beta_text is not None and self.beta_image is not None
        scores = parts.plain + self.beta_text * parts.text + self.beta_image * parts.image
        return scores if queries.kind == "image" else scores.T

    def _chosen(self, reference: "Reference") -> tuple[float, float]:
        val, weights = reference.val, reference.weights
        assert val is not None and weights is not None and val.labels is not None
        parts = attended(val.vectors, weights.vectors)
        best, found = -float("inf"), (0.0, 0.0)
        for text in _GRID if self.beta_text is None else (self.beta_text,):
            for image in _GRID if self.beta_image is None else (self.beta_image,):
                scores = weights.reduced(parts.plain + text * parts.text + image * parts.image)
                value = reference.metric(scores, val.labels)
                if value > best:  # of equals the smallest betas
                    best, found = value, (text, image)
        return found


def attended(images: Vectors, texts: Tensor) -> Parts:
    """The similarities that the score is made of.

    Args:
        images: n, with patches.
        texts: (r,D).

    Raises:
        ModelError: images without patches in the joint space.
    """
    if images.patches is None:
        raise ModelError(
            "calip needs patches in the joint space, and these image features have none. Take a CLIP ViT, and features "
            "made with patches."
        )
    chunks = list(_attended(images.pooled, images.patches, texts))
    if not chunks:
        none = texts.new_empty(0, len(texts))
        return Parts(none, none, none)
    return Parts(*(torch.cat(one) for one in zip(*chunks, strict=True)))


def _attended(pooled: Tensor, patches: Tensor, texts: Tensor) -> Iterator[Parts]:
    for x, local in zip(pooled.split(_ROWS), patches.to(texts.dtype).split(_ROWS), strict=True):
        attention = _SHARPNESS * local @ texts.T  # (b,P,r)
        # x T' without T' itself: the attention of each class over the similarities of the patches with x.
        by_text = ((local @ x[..., None]) * attention.softmax(dim=1)).sum(dim=1)
        mixed = attention.softmax(dim=2) @ texts  # (b,P,D)
        yield Parts(x @ texts.T, by_text, (mixed.mean(dim=1) + mixed.amax(dim=1)) @ texts.T)


ADDON = Calip
