"""k nearest neighbours on frozen features, each neighbour's vote weighted by its similarity.

KnnEvaluator(divide(source.records), class_names).run(embedder).metrics["accuracy@1/10_neighbours"]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, parts_of
from eval.labelled import Parts, check_parts, embed_labelled
from eval.metrics import bootstrap_interval, hit_probability, label_ranks
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.errors import ConfigError, GalleryError
from vlkit.index.faiss_index import EmbeddingIndex

_ROWS = 4096


@dataclass(frozen=True)
class KnnEvaluator(Evaluator):
    """Accuracy of a weighted vote of the k nearest training images; nothing is fitted.

    Attributes:
        parts: `train` and `val` together are the neighbours, `test` is classified.
        class_names: (C,).
        ks: numbers of neighbours.
        temperature: a neighbour at cosine s votes exp(s / temperature).
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) images.
    """

    parts: Parts
    class_names: Sequence[str]
    ks: tuple[int, ...] = (1, 5, 10, 20)
    temperature: float = 0.07
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: a part without images, or a label without a name.
            ConfigError: a k below 1 or a temperature that is not positive.
        """
        check_parts(self.parts, len(self.class_names))
        if not self.ks or min(self.ks) < 1 or not self.temperature > 0:
            raise ConfigError(f"k {self.ks}, temperature {self.temperature}: k is at least 1, the temperature above 0.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, search, vote.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `accuracy@1/{k}_neighbours`; `per_item` one row a test image.

        Raises:
            GalleryError: k exceeds the training images, or features that are not finite.
        """
        pool = [*self.parts.train, *self.parts.val]
        of_pool, of_test = parts_of(self.progress, len(pool), len(self.parts.test))
        train = embed_labelled(source, pool, self.batch_size, self.workers, of_pool)
        test = embed_labelled(source, self.parts.test, self.batch_size, self.workers, of_test)
        votes = neighbour_votes(
            train.features, train.labels, test.features, self.ks, len(self.class_names), self.temperature
        )
        hits = torch.stack([hit_probability(label_ranks(one, test.labels), 1) for one in votes], dim=1)
        low, high = bootstrap_interval(hits, seed=self.seed)
        keys = [f"accuracy@1/{k}_neighbours" for k in self.ks]
        unreadable = train.unreadable + test.unreadable
        return Evaluation(
            metrics={key: hits[:, place].mean().item() for place, key in enumerate(keys)},
            intervals={key: (low[place].item(), high[place].item()) for place, key in enumerate(keys)},
            protocol={
                "images": IMAGES,
                "parts": self.parts.how,
                "similarity": "cosine, exact search",
                "vote": f"exp(similarity / {self.temperature:g})",
                "ks": list(self.ks),
                "interval": f"95%, percentile bootstrap, 1000 resamples of test images, seed {self.seed}",
            },
            counts={
                "train_images": len(train.records),
                "images": len(test.records),
                "classes": len(self.class_names),
                "classes_without_train_images": len(self.class_names) - len(train.labels.unique()),
                "classes_without_test_images": len(self.class_names) - len(test.labels.unique()),
                "unreadable_images": len(unreadable),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in test.records],
                    "class": [self.class_names[label] for label in test.labels.tolist()],
                    **{f"hit@1/{k}_neighbours": hits[:, place].numpy() for place, k in enumerate(self.ks)},
                }
            ),
            figures={"unreadable_images": unreadable},
        )


def neighbour_votes(
    gallery: Tensor, labels: Tensor, queries: Tensor, ks: Sequence[int], num_classes: int, temperature: float
) -> list[Tensor]:
    """For each k the votes (Q,C) of the k nearest gallery items.

    Args:
        gallery: (N,D) unit norm.
        labels: (N,) int64.
        queries: (Q,D) unit norm.
        ks: numbers of neighbours.
        num_classes: C.
        temperature: of the votes.

    Raises:
        GalleryError: a k above N; features that are not finite.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4; Caron et al. 2021 (DINO), arXiv:2104.14294, appendix.
    Differs: votes are divided by the largest, exp((s - s_1) / temperature), which changes no order between classes.
    """
    if max(ks) > len(gallery):
        raise GalleryError(f"k is {max(ks)}, but there are {len(gallery)} training images. Ask for fewer neighbours.")
    index = EmbeddingIndex.build(gallery, [str(row) for row in range(len(gallery))])
    votes = [torch.zeros(len(queries), num_classes, dtype=torch.float64) for _ in ks]
    for start in range(0, len(queries), _ROWS):
        found = index.search(queries[start : start + _ROWS], max(ks))
        near = labels[torch.tensor([[int(name) for name in row] for row in found.ids])]
        weight = ((found.scores.double() - found.scores.double()[:, :1]) / temperature).exp()
        for one, k in zip(votes, ks, strict=True):
            one[start : start + _ROWS].scatter_add_(1, near[:, :k], weight[:, :k])
    return votes
