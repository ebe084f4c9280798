"""Full precision's classes at almost the speed of bf16: close calls are encoded again.

    sources = open_sources("run:runs/clip", records, cache=FeatureCache.default())
    classifier = ZeroShotClassifier.build(sources.exact, class_names)
    look = None if sources.first is sources.exact else SecondLook(sources.exact, classifier)
    classify_images(sources.first, classifier, records, second_look=look)

Let x be the fp32 feature of an image, y its bf16 feature, v the vector of the class that y is nearest to and w that of
another. fp32 chooses the same class if y lies further from the plane between v and w, y.(v - w) / |v - w|, than the
error y - x reaches across it; and so for every w. How far errors reach across these planes is measured: some images are
encoded in both precisions, and the bound is `SPREADS` times the root mean square over them and all their planes.
An image that lies nearer to one of its planes, or whose probability lies so near to the threshold of the unsure, is
encoded again in fp32 and keeps that feature. Class vectors are fp32's throughout.

Measured on 1,706 photographs and drawings with a small ViT and 60 lists of 100 classes: 2.9% of the images were encoded
again, and among them all 192 whose class bf16 alone changes. One error in 30,000 was beyond the bound, by half at most:
it is a measure, no proof. Only the first class and being unsure are fp32's; the probabilities may be bf16's, which
differ in the fourth digit.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlkit.addons.classifier import ZeroShotClassifier
from vlkit.addons.exchange import ClassWeights
from vlkit.data.records import Record
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import EmbeddedChunk, Embedder, ReadableImages

SPREADS = 6.0  # root mean squares that an error may reach
POOL = 128  # first images, among which those to be measured are chosen
NUM_MEASURED = 8  # the least safe of them, which most likely have to be encoded again anyway
_PAIRS_AT_ONCE = 1 << 22  # images x vectors that are compared together: tens of MB
_SAME = 1e-6  # vectors nearer than this are one: nothing lies between two classes of equal names


class Distances(NamedTuple):
    """How images lie to the planes between the vector they are nearest to and all others; r vectors, n images."""

    lead: Tensor  # (n,r) by how much the nearest vector's score exceeds each other's; 0 for itself
    length: Tensor  # (n,r) length of the difference of the two vectors
    rival: Tensor  # (n,r) bool: a vector of another class that can be told apart
    own: Tensor  # (n,) the class of the nearest vector

    def nearest(self) -> Tensor:
        """(n,) distance of each image from the nearest plane; infinite where there is none."""
        far = torch.full_like(self.lead, torch.inf)
        return torch.where(self.rival, self.lead / self.length.clamp(min=_SAME), far).amin(1)


class SecondLook:
    """Encodes images again whose class, or whose being unsure, bf16 may have changed. For one run over images.

    Args:
        exact: the same model in fp32.
        classifier: built with `exact`.
        min_probability: below it an image counts as unsure; 0 for never.

    Attributes:
        num_again: how many images were encoded (or looked up) in fp32.
        bound: how far errors reach across planes, in units of the cosine; None before it is measured.
    """

    def __init__(
        self, exact: Embedder | FeatureSource, classifier: ZeroShotClassifier, min_probability: float = 0.0
    ) -> None:
        self.exact, self.classifier, self.min_probability = exact, classifier, min_probability
        self.num_again = 0
        self.bound: float | None = None
        self._vectors, self._class_of, self._bias = one_vector_each(classifier.weights)

    def settle(
        self, chunks: Iterable[EmbeddedChunk], records: Sequence[Record], batch_size: int = 64, workers: int = 0
    ) -> Iterator[EmbeddedChunk]:
        """The same chunks, with fp32 features for close calls.

        The first ones wait until `POOL` images can be measured on, whatever the size of chunks: a second run, which
        finds other chunks in its cache, decides alike.
        """
        waiting: list[EmbeddedChunk] = []
        for chunk in chunks:
            if self.bound is not None:
                yield self._settled(chunk, records, batch_size, workers)
                continue
            waiting.append(chunk)
            if sum(len(one.rows) for one in waiting) >= POOL:
                yield from self._after_measuring(waiting, records, batch_size, workers)
        if self.bound is None and waiting:
            yield from self._after_measuring(waiting, records, batch_size, workers)

    def distances(self, features: Tensor) -> Distances:
        """Of unit features (n,D)."""
        scores = features @ self._vectors.T + self._bias
        best = scores.argmax(1)
        squares = self._vectors.square().sum(1)
        product = self._vectors[best] @ self._vectors.T
        length = (squares[best, None] + squares - 2 * product).clamp(min=0).sqrt()
        own = self._class_of[best]
        rival = (self._class_of != own[:, None]) & (length > _SAME)
        return Distances(scores.gather(1, best[:, None]) - scores, length, rival, own)

    def is_close(self, features: Tensor) -> Tensor:
        """(n,) bool: whether an error up to the bound could change the class or its being unsure."""
        assert self.bound is not None, "nothing was measured"
        close = [torch.zeros(0, dtype=torch.bool)]
        for some in features.split(max(1, _PAIRS_AT_ONCE // len(self._vectors))):
            found = self.distances(some)
            close.append(found.nearest() <= self.bound)
            if self.min_probability > 0:
                least, most = self._probabilities(found, some)
                close[-1] |= (least < self.min_probability) & (most >= self.min_probability)
        return torch.cat(close)

    def _after_measuring(
        self, waiting: list[EmbeddedChunk], records: Sequence[Record], batch_size: int, workers: int
    ) -> Iterator[EmbeddedChunk]:
        rows = [row for chunk in waiting for row in chunk.rows][:POOL]
        features = torch.cat([chunk.embeddings for chunk in waiting])[:POOL]
        chosen = self.distances(features).nearest().argsort(stable=True)[:NUM_MEASURED]
        read = self._encode([records[rows[place]] for place in chosen.tolist()], batch_size, workers)
        chosen = chosen[read.kept]
        self.bound = self._reach(features[chosen], read.embeddings)
        known = {rows[place]: feature for place, feature in zip(chosen.tolist(), read.embeddings, strict=True)}
        self.num_again += len(known)
        for chunk in waiting:
            yield self._settled(chunk, records, batch_size, workers, known)

    def _reach(self, rounded: Tensor, exact: Tensor) -> float:
        """The bound, from features in both precisions."""
        found = self.distances(rounded)
        shift = (rounded - exact) @ self._vectors.T
        mine = found.lead.argmin(1, keepdim=True)
        across = (shift.gather(1, mine) - shift)[found.rival] / found.length[found.rival]
        if not across.numel():  # one class alone: no plane, and the whole error in its place
            return float((rounded - exact).norm(dim=1).sum())
        return SPREADS * float(across.square().mean().sqrt())

    def _settled(
        self,
        chunk: EmbeddedChunk,
        records: Sequence[Record],
        batch_size: int,
        workers: int,
        known: dict[int, Tensor] | None = None,
    ) -> EmbeddedChunk:
        known = known or {}
        features = chunk.embeddings.clone()
        for place, row in enumerate(chunk.rows):
            if row in known:
                features[place] = known[row]
        places = [place for place in self.is_close(features).nonzero()[:, 0].tolist() if chunk.rows[place] not in known]
        if not places:
            return chunk._replace(embeddings=features)
        read = self._encode([records[chunk.rows[place]] for place in places], batch_size, workers)
        self.num_again += len(read.kept)
        features[[places[i] for i in read.kept]] = read.embeddings
        # A file that vanished since the first look.
        lost = {chunk.rows[places[i]]: reason for i, reason in read.failures}
        stay = [place for place, row in enumerate(chunk.rows) if row not in lost]
        return EmbeddedChunk(
            [chunk.rows[place] for place in stay],
            features[stay],
            sorted([*chunk.failures, *lost.items()]),
            chunk.norms[stay],
        )

    def _encode(self, records: Sequence[Record], batch_size: int, workers: int) -> ReadableImages:
        return self.exact.embed_images_where_readable(records, batch_size=batch_size, workers=workers)

    def _probabilities(self, found: Distances, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) the least and the greatest probability of each image's class that errors up to the bound leave."""
        assert self.bound is not None
        classifier, reach = self.classifier, self.bound * found.length
        if classifier.family == "sigmoid":
            best = self.classifier.weights.scores(features).amax(1)
            spread = self.bound * self._vectors.norm(dim=1).max()
            low, high = (classifier.logit_scale * (best + side * spread) + classifier.logit_bias for side in (-1, 1))
            return low.sigmoid(), high.sigmoid()
        rank = self._class_of.expand(len(features), -1)
        start = found.lead.new_full((len(features), classifier.weights.num_classes), -torch.inf)
        lowest = start.scatter_reduce(1, rank, -found.lead - reach, "amax")
        highest = start.scatter_reduce(1, rank, -found.lead + reach, "amax")
        of_class = []
        for own, others in ((lowest, highest), (highest, lowest)):
            logits = others.scatter(1, found.own[:, None], own.gather(1, found.own[:, None]))
            chance = (classifier.logit_scale * logits).softmax(1)
            of_class.append(chance.gather(1, found.own[:, None])[:, 0])
        return of_class[0], of_class[1]


def one_vector_each(weights: ClassWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (r,D), their classes (r,) and biases (r,) so that a class scores the greatest of its vectors' scores."""
    vectors, class_of = weights.vectors, weights.class_of
    if weights.reduce == "mean":
        sums = vectors.new_zeros(weights.num_classes, vectors.shape[1]).index_add(0, class_of, vectors)
        vectors = sums / torch.bincount(class_of)[:, None]
        class_of = torch.arange(weights.num_classes)
    bias = vectors.new_zeros(len(vectors)) if weights.bias is None else weights.bias[class_of]
    return vectors, class_of, bias
