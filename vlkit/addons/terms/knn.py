"""kNN augmentation: neighbours say which examples are hard while a linear classifier is trained, and vote at the test.

    training   loss of image i x (1 + c x -log p_knn(y_i))          p_knn without the image itself
    test       p = (1 - a) softmax(classifier) + a p_knn
    p_knn      votes exp(similarity / T) of the 20 nearest few-shot images, as shares

Source: Jia et al. 2021, "Rethinking Nearest Neighbors for Visual Classification", arXiv:2112.08459, and the authors'
code: k 20, T 1, -log p at most 100, a 0.1, which is c as well; SGD with momentum and a learning rate of 0.01.
Differs: the classifier starts from the zero-shot weights instead of random ones: it learns a vector and a bias of each
class that are added to the model's logits (an encoder of images alone has no others). a is chosen on validation images
where there are any; there c is 0.1 all the same. Similarity is the cosine, the code's default a negative squared
distance of centred unit features, which is no other order but for the centring. 100 epochs of AdamW 1e-3 on features;
the paper trains the backbone as well.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Need, Term, Vectors, learned
from vlkit.addons.cache_model import best_setting
from vlkit.addons.feature_training import Schedule, parameter, train
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

MIX = 0.1
_MIXES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
HARDEST = 100.0  # greatest -log p, for an image none of whose neighbours has its class


@dataclass(frozen=True)
class Knn(Term):
    """A linear classifier and its neighbours.

    Attributes:
        mix: a, share of the neighbours; None: chosen on validation images, else 0.1. 0 is the classifier alone.
        hard: c, how much more hard examples count in training; 0: all alike.
        k: neighbours, fewer where there are fewer images.
        temperature: T of the votes.
        epochs: of training; 0 leaves the zero-shot classifier.
        lr: of AdamW.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names"})
    uses: ClassVar[frozenset[Need]] = frozenset({"val_labels"})

    mix: float | None = None
    hard: float = 0.1
    k: int = 20
    temperature: float = 1.0
    epochs: int = 100
    lr: float = 1e-3
    keys: Tensor | None = learned()  # (n,D) unit norm
    values: Tensor | None = learned()  # (n,C) one-hot
    vectors: Tensor | None = learned()  # (C,D) added to the class vectors
    bias: Tensor | None = learned()  # (C,) added to the logits

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train the classifier; choose the mix.

        Raises:
            ConfigError: a mix outside 0..1, or no neighbour.
            DataError: a single image.
        """
        shots = reference.few_shot
        assert shots is not None and shots.labels is not None
        if self.k < 1 or self.temperature <= 0 or not 0 <= (self.mix or 0.0) <= 1:
            raise ConfigError(
                f"knn: k {self.k}, temperature {self.temperature}, mix {self.mix}; expected 1 or more, above 0, 0 to 1."
            )
        if len(shots) < 2:
            raise DataError("knn needs at least two few-shot images: an image is no neighbour of itself.")
        values = F.one_hot(shots.labels, len(reference.class_names)).float()
        filled = replace(self, keys=F.normalize(shots.vectors.pooled, dim=-1), values=values)
        vectors, bias = filled._trained(reference, progress)
        return replace(filled, vectors=vectors, bias=bias)._chosen(reference)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C): the logarithm of the mixture, less the logits."""
        assert self.mix is not None
        return self._mixed(queries, logits, self.mix) - logits

    def _mixed(self, queries: Vectors, logits: Tensor, mix: float) -> Tensor:
        assert self.keys is not None and self.values is not None
        assert self.vectors is not None and self.bias is not None
        own = (logits + self.logit_scale * queries.pooled @ self.vectors.T + self.bias).log_softmax(-1)
        if mix == 0:
            return own
        similarity = F.normalize(queries.pooled, dim=-1) @ self.keys.T
        shares = neighbour_shares(similarity, self.values, self.k, self.temperature)
        # Never the logarithm of zero, where the neighbours alone count.
        return ((1 - mix) * own.exp() + mix * shares).clamp(min=1e-30).log()

    def _trained(self, reference: "Reference", progress: Progress | None) -> tuple[Tensor, Tensor]:
        shots, logits = reference.few_shot, reference.logits
        assert shots is not None and shots.labels is not None and logits is not None
        assert self.keys is not None and self.values is not None
        labels, num_classes = shots.labels, self.values.shape[1]
        similarity = (self.keys @ self.keys.T).fill_diagonal_(-torch.inf)
        shares = neighbour_shares(similarity, self.values, min(self.k, len(labels) - 1), self.temperature)
        hardness = -shares.gather(1, labels[:, None])[:, 0].log().clamp(min=-HARDEST)
        importance = 1 + self.hard * hardness
        with torch.no_grad():
            base = logits(shots.vectors)
        vectors = parameter(torch.zeros(num_classes, shots.vectors.pooled.shape[1]))
        bias = parameter(torch.zeros(num_classes))

        def loss(rows: Tensor, epoch: int) -> Tensor:
            added = self.logit_scale * shots.vectors.pooled[rows] @ vectors.T + bias
            return (F.cross_entropy(base[rows] + added, labels[rows], reduction="none") * importance[rows]).mean()

        train([vectors, bias], Schedule(self.epochs, self.lr), len(labels), loss, reference.seed, progress)
        return vectors.detach(), bias.detach()

    def _chosen(self, reference: "Reference") -> Self:
        if self.mix is not None or reference.val is None:
            return replace(self, mix=MIX if self.mix is None else self.mix)
        assert reference.logits is not None
        images = reference.val.vectors
        base = reference.logits(images)
        (mix,) = best_setting(reference, (((mix,), self._mixed(images, base, mix)) for mix in _MIXES))
        return replace(self, mix=mix)


def neighbour_shares(similarity: Tensor, values: Tensor, k: int, temperature: float) -> Tensor:
    """(Q,C) votes exp(similarity / temperature) of the k nearest, as shares.

    Args:
        similarity: (Q,n); minus infinity for an item that may not vote.
        values: (n,C) one-hot.
        k: neighbours.
        temperature: of the votes.
    """
    nearest = similarity.topk(min(k, similarity.shape[1]), dim=1)
    votes = (nearest.values / temperature).softmax(dim=1)
    return torch.einsum("qk,qkc->qc", votes, values[nearest.indices])


ADDON = Knn
