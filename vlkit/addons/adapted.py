"""Scores of images against classes, and of images against texts, as a pipeline of add-ons makes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlkit.addons.base import (
    FeatureMap,
    GalleryBias,
    GatedGalleryBias,
    Merge,
    PairScoring,
    StreamingTerm,
    Term,
)
from vlkit.addons.classifier import Family, Predictions
from vlkit.addons.exchange import ClassWeights, Vectors, Weights, no_vectors
from vlkit.errors import ConfigError

Direction = Literal["image_to_text", "text_to_image"]
# Queries scored at a time: 512 x 25,000 gallery items are 50 MB.
CHUNK = 512


@dataclass(frozen=True)
class AdaptedClassifier:
    """A zero-shot classifier with add-ons. `Pipeline.classifier` makes one.

    Attributes:
        class_names: (C,) as shown.
        weights: of each class weighting, not mapped.
        maps, scoring, terms, bias, merge: the add-ons by slot.
        logit_scale, logit_bias, family: of the encoder, as in `ZeroShotClassifier`.
    """

    class_names: tuple[str, ...]
    weights: tuple[Weights, ...]
    maps: tuple[FeatureMap, ...]
    scoring: PairScoring | None
    terms: tuple[Term | StreamingTerm, ...]
    bias: GalleryBias | None
    merge: Merge | None
    logit_scale: float
    logit_bias: float
    family: Family

    def logits(self, images: Vectors) -> Tensor:
        """Logits (n,C), logit_scale x score and what terms add, without the bias of sigmoid-trained encoders.

        With a streaming term the images are taken in order, from its state on.
        """
        return self.step(images).logits

    def step(self, images: Vectors) -> "Classified":
        """Logits, and the classifier for the images after these: streaming terms remember what they saw."""
        parts = [self._logits_of(one, images) for one in self.weights]
        later = replace(self, terms=parts[-1].terms)
        if self.merge is None:
            return Classified(parts[0].logits, later)
        merged = self.merge.merge([part.logits for part in parts])
        assert merged.shape == (len(images), len(self.class_names)), merged.shape
        return Classified(merged, later)

    def probabilities(self, images: Vectors) -> Tensor:
        """(n,C): softmax over the classes, or each class alone where the encoder was trained so."""
        return self.probabilities_of(self.logits(images))

    def probabilities_of(self, logits: Tensor) -> Tensor:
        """The same of logits (n,C)."""
        shifted = logits + self.logit_bias
        return shifted.sigmoid() if self.family == "sigmoid" else shifted.softmax(dim=-1)

    def predict(self, images: Vectors, k: int = 5) -> Predictions:
        """The k best classes of each image, fewer when there are fewer classes."""
        return self.best(self.logits(images), k)

    def best(self, logits: Tensor, k: int = 5) -> Predictions:
        """The k best classes of logits (n,C)."""
        if k < 1:
            raise ConfigError(f"top k is {k}; it must be at least 1.")
        best = self.probabilities_of(logits).topk(min(k, len(self.class_names)), dim=-1)
        return Predictions(best.indices, best.values, self.rule)

    @property
    def rule(self) -> str:
        """How probabilities are computed, in words for a result."""
        scale = f"{self.logit_scale:.4g}"
        if self.family == "sigmoid":
            return f"sigmoid({scale} x similarity {self.logit_bias:+.4g}), with add-ons, each class alone"
        return f"softmax({scale} x similarity, with add-ons) over {len(self.class_names)} classes"

    def _logits_of(self, weights: Weights, images: Vectors) -> "_Part":
        if isinstance(weights, ClassWeights):
            images, scores, corrected = self._scores(weights, images)
        else:
            if self.maps or self.scoring is not None or self.bias is not None:
                raise ConfigError(
                    "Class weights that depend on the image go neither with feature maps, nor with another pair score, "
                    "nor with a gallery bias: there is no one set of vectors for them to act on. Leave those out."
                )
            scores = corrected = weights.scores(images)
        base = self.logit_scale * scores
        total = base
        terms: list[Term | StreamingTerm] = []
        for term in self.terms:
            added, later = _applied(term, images, total)
            assert added.shape == base.shape, (term.name, added.shape, base.shape)
            total = total + added
            terms.append(later)
        # A bias is subtracted last; terms see the logits without it.
        return _Part(total + self.logit_scale * (corrected - scores), tuple(terms))

    def _scores(self, weights: ClassWeights, images: Vectors) -> tuple[Vectors, Tensor, Tensor]:
        """Mapped images, scores (n,C), and scores with the gallery bias."""
        texts = Vectors("text", weights.vectors)
        images, texts = through_maps(self.maps, images, texts)
        similarity = similarity_of(self.scoring, images, texts)
        scores = weights.reduced(similarity)
        if self.bias is None:
            return images, scores, scores
        return images, scores, weights.reduced(similarity - subtracted(self.bias, similarity, texts))


class Classified(NamedTuple):
    """Logits of some images."""

    logits: Tensor  # (n,C)
    classifier: AdaptedClassifier  # for the images after them


class _Part(NamedTuple):
    """Logits from one class weighting, and the terms afterwards."""

    logits: Tensor
    terms: tuple[Term | StreamingTerm, ...]


def through_maps(maps: Sequence[FeatureMap], images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
    """Both sides through feature maps in turn; views of the images go along, for whoever takes them behind a map."""
    for one in maps:
        views = None if images.views is None else _mapped_views(one, images)
        images, texts = one.map(images, texts)
        images = replace(images, views=views)
    return images, texts


def _mapped_views(one: FeatureMap, images: Vectors) -> Tensor:
    """(n,V,D) each view as if it were the image."""
    assert images.views is not None
    # The lengths of views are not kept; that of the image itself stands for them.
    norm = None if images.norm is None else images.norm.repeat_interleave(images.views.shape[1])
    flat = images.views.flatten(0, 1)
    alone = Vectors("image", flat, norm=norm, views=flat[:, None])  # its own only view
    mapped = one.map(alone, no_vectors("text", flat.shape[1]))[0].pooled
    views: Tensor = mapped.unflatten(0, images.views.shape[:2])
    return views


def similarity_of(scoring: PairScoring | None, queries: Vectors, gallery: Vectors) -> Tensor:
    """(q,g): the pair score, or inner products."""
    if scoring is None:
        return queries.pooled @ gallery.pooled.T
    scores = scoring.score(queries, gallery)
    assert scores.shape == (len(queries), len(gallery)), (scoring.name, scores.shape)
    return scores


def subtracted(bias: GalleryBias, similarity: Tensor, gallery: Vectors) -> Tensor:
    """What a bias takes from similarities (q,N): (N,), or (q,N) where it is gated."""
    amount = bias.bias(gallery)
    assert amount.shape == (len(gallery),), (bias.name, amount.shape)
    if not isinstance(bias, GatedGalleryBias):
        return amount
    gate = bias.gate(similarity, gallery)
    return gate[:, None].to(amount.dtype) * amount


def _applied(term: Term | StreamingTerm, images: Vectors, logits: Tensor) -> tuple[Tensor, Term | StreamingTerm]:
    """What a term adds, and the term afterwards."""
    return (term.term(images, logits), term) if isinstance(term, Term) else _streamed(term, images, logits)


def _streamed(term: StreamingTerm, images: Vectors, logits: Tensor) -> tuple[Tensor, StreamingTerm]:
    """One image after the other; what is added, and the term afterwards."""
    rows = []
    for row in range(len(images)):
        added, term = term.step(images.rows([row]), logits[row : row + 1])
        rows.append(added)
    return (torch.cat(rows) if rows else torch.zeros_like(logits)), term


@dataclass(frozen=True)
class AdaptedRetrieval:
    """Images and texts scored against each other. `Pipeline.retrieval` makes one.

    Attributes:
        images: (N,D) mapped.
        texts: (M,D) mapped.
        scoring, bias: the add-ons of these slots.
    """

    images: Vectors
    texts: Vectors
    scoring: PairScoring | None
    bias: GalleryBias | None

    def scores(self, direction: Direction, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Scores of all queries against the whole gallery, some rows at a time, on the scale of the cosine."""
        queries, gallery = self.sides(direction)
        amount = None if self.bias is None or isinstance(self.bias, GatedGalleryBias) else self.bias.bias(gallery)
        for start in range(0, len(queries), chunk):
            similarity = similarity_of(self.scoring, queries.rows(slice(start, start + chunk)), gallery)
            if amount is not None:
                similarity = similarity - amount
            elif self.bias is not None:
                similarity = similarity - subtracted(self.bias, similarity, gallery)
            yield similarity

    def sides(self, direction: Direction) -> tuple[Vectors, Vectors]:
        """Queries and gallery."""
        return (self.images, self.texts) if direction == "image_to_text" else (self.texts, self.images)


def merged_scores(merge: Merge | None, parts: Sequence[Tensor]) -> Tensor:
    """Scores of a query that has several parts (words and an image): merged, or their mean."""
    return torch.stack(list(parts)).mean(0) if merge is None else merge.merge(parts)
