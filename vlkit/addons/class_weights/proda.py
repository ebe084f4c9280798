"""ProDA: many learned contexts; the vectors of the classes are a Gaussian, and the loss bounds its expected value.

    l_k = scale x.m_k + scale^2 / 2  sum_d x_d^2 (A_yy + A_kk - 2 A_yk)_d            A: covariance over contexts
    loss = cross-entropy(l, y) + spread x mean over i != j of |cos(g(context_i), g(context_j))|

m_k is the mean over contexts of the unit features of class k, A_ck its covariance with class c in each channel. A
quarter of the contexts has the class name in front, a quarter in the middle, half at the end. At use W = m.

Source: Lu et al. 2022, "Prompt Distribution Learning", arXiv:2205.03340; the form of the bound from an independent
implementation, and derived anew: E log sum exp <= log sum exp of the mean and half the variance.
Differs: what the authors' own code does is not known, as it could not be had. The covariance is divided by the number
of contexts. `spread` is the paper's 0.1 beside logits of 100 x cosine, as much smaller as the multiplier is. Some of
the contexts, drawn in each step, take part in it (`sampled`), to save memory. Of a class's names the first counts.
Training as `coop`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.prompted_text import Position, PromptedText, Prompts, first_names
from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts, features_of
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class ProDA(TextPrompts):
    """A distribution of prompts; see `TextPrompts` for the other settings. `position` is that of no context.

    Attributes:
        contexts: n of them.
        sampled: those that take part in a step; None for all.
        spread: weight of what keeps them apart.
    """

    text_space: ClassVar[bool] = False  # means of unit vectors have not unit norm

    contexts: int = 32
    sampled: int | None = 4
    spread: float = 0.1

    def start(self, task: PromptTask) -> Learned:
        """(n,M,W)."""
        if self.contexts < 1 or (self.sampled is not None and not 1 <= self.sampled <= self.contexts):
            raise ConfigError(f"proda: {self.contexts} contexts, {self.sampled} in a step; expected 1 to all of them.")
        return {"vectors": self.first_vectors(task, sets=self.contexts)}

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """The bound, and what keeps contexts apart."""
        by_place = self._by_place(task.class_names, task.source)
        bare = PromptedText(task.text.encoder, alone(task.text), self.precision, self.checkpointing)
        random = torch.Generator().manual_seed(task.seed)
        count, spread = self.contexts if self.sampled is None else self.sampled, task.from_paper(self.spread)

        def loss(rows: Tensor) -> Tensor:
            chosen = torch.randperm(self.contexts, generator=random)[:count].sort().values
            features = features_at(by_place, found["vectors"], positions(self.contexts), chosen)
            logits = bounded_logits(features, task.images[rows], task.labels[rows], task.scale)
            own = bare.features(found["vectors"][chosen][:, None])[:, 0]
            return F.cross_entropy(logits, task.labels[rows]) + spread * likeness(own)

        return loss

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """The means."""
        assert self.vectors is not None
        vectors, places = self.vectors, positions(self.contexts)
        made = []
        for place, text in self._by_place(class_names, embedder).items():
            rows = [row for row, one in enumerate(places) if one == place]
            made += [features_of(text, vectors[rows][:, None])] if rows else []
        return ClassWeights(torch.cat(made).mean(0), torch.arange(len(class_names)))

    def prompted(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> PromptedText:
        """With the first name of each class."""
        return super().prompted(first_names(class_names), embedder)

    def _by_place(self, class_names: Sequence[ClassName], source: "FeatureSource") -> dict[Position, PromptedText]:
        return {place: replace(self, position=place).prompted(class_names, source) for place in PLACES}


PLACES: tuple[Position, ...] = ("front", "middle", "end")


def positions(contexts: int) -> list[Position]:
    """Of the class name in each of n contexts: a quarter in front, a quarter in the middle, the rest at the end."""
    quarter = contexts // 4
    counts = dict(zip(PLACES, (quarter, quarter, contexts - 2 * quarter), strict=True))
    return [place for place, count in counts.items() for _ in range(count)]


def features_at(
    by_place: dict[Position, PromptedText], vectors: Tensor, places: Sequence[Position], chosen: Tensor
) -> Tensor:
    """(S,C,D) features of some contexts, each with the name at its place."""
    made = []
    for place, text in by_place.items():
        rows = [row for row in chosen.tolist() if places[row] == place]
        if rows:
            made.append(text.features(vectors[rows][:, None]))
    return torch.cat(made)


def bounded_logits(features: Tensor, images: Tensor, labels: Tensor, scale: float) -> Tensor:
    """(B,C) whose cross-entropy bounds the expected one.

    Args:
        features: (S,C,D) unit norm, a sample of the classes' vectors each.
        images: (B,D).
        labels: (B,).
        scale: of the cosine.
    """
    mean = features.mean(0)
    centred = features - mean
    squared = images**2
    variance = centred.square().mean(0)  # (C,D)
    together = torch.einsum("bd,sbd,scd->bc", squared, centred[:, labels], centred) / len(features)
    own = (squared * variance[labels]).sum(1, keepdim=True)
    return scale * images @ mean.T + scale**2 / 2 * (own + squared @ variance.T - 2 * together)


def likeness(features: Tensor) -> Tensor:
    """() mean |cosine| of different rows (S,D); 0 for one row."""
    count = len(features)
    if count < 2:
        return features.sum() * 0
    return ((features @ features.T).abs().sum() - count) / (count * (count - 1))


def alone(text: PromptedText) -> Prompts:
    """A prompt of the learned vectors and nothing else, not even a period."""
    count = text.prompts.places.shape[1]
    ids = text.prompts.tokens[0][text.prompts.places[0]].tolist()
    start, end = text.encoder.tokenize.encode_whole([""])[0]
    tokens = text.encoder.tokenize.pad([[start, *ids, end]])
    return Prompts(tokens, torch.arange(1, count + 1)[None], torch.zeros(1, dtype=torch.int64))


ADDON = ProDA
