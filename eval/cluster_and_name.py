"""Clustering images without labels and naming the clusters: CPP, against k-means on the plain features.

ClusterAndNameEvaluator(records, class_names, vocabulary).run(source).metrics["cluster_accuracy"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, embed_records, parts_of
from eval.metrics import cluster_accuracy
from eval.rate_reduction import CppSettings, best_number, k_means, membership, spectral_clusters, train_head
from eval.vocabulary_free import name_columns
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError
from vlkit.features.feature_set import check_finite

# Images whose memberships are held at once: 36 MB of float32.
_POOL = 3000
# As in the released code, whatever the model's own scale.
_SCALE = 100.0
_TOP = 5


class Clustered(NamedTuple):
    """Clusters of N images."""

    clusters: Tensor  # (N,) int64
    lengths: dict[int, float]  # coding length of each number of clusters tried; empty where one was given


@dataclass(frozen=True)
class ClusterAndNameEvaluator(Evaluator):
    """Clusters, their number and their names; labels, where there are any, only measure.

    Attributes:
        records: images.
        class_names: of their labels; empty where there are none.
        vocabulary: words to name clusters with; empty leaves them without names.
        num_clusters: one number, or several of which the shortest coding length chooses.
        settings: of the head.
        template: of a word.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        progress: called with (done, total) over images and steps.
    """

    records: Sequence[Record]
    class_names: Sequence[str]
    vocabulary: Sequence[str]
    num_clusters: tuple[int, ...]
    settings: CppSettings = field(default_factory=CppSettings)
    template: str = "a photo of a {}"
    batch_size: int = 64
    workers: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: no number of clusters, one below 2, or a template without one `{}`.
        """
        if not self.num_clusters or min(self.num_clusters) < 2:
            raise ConfigError(f"Numbers of clusters {self.num_clusters}; expected at least one, from 2.")
        if self.template.count("{}") != 1:
            raise ConfigError(f"Template {self.template!r} needs exactly one {{}} for the word.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, train the head, cluster, name, compare.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `largest_cluster` (its share of the images); with labels `cluster_accuracy`,
            `normalized_mutual_information` and both behind `k_means/` for plain features; with a vocabulary too
            `semantic_similarity`, `semantic_iou`, `exact_match` of each image's cluster name;
            `per_item` one row an image.

        Raises:
            DataError: fewer readable images than clusters.
            GalleryError: features that are not finite.
        """
        num_steps = self.settings.epochs * max(1, len(self.records) // self.settings.batch_size)
        of_images, of_steps = parts_of(self.progress, len(self.records), num_steps)
        images = embed_records(source, self.records, self.batch_size, self.workers, of_images)
        if len(images.records) < max(self.num_clusters):
            raise DataError(f"{len(images.records)} readable images for {max(self.num_clusters)} clusters; give more.")
        found = cluster_images(images.features, self.num_clusters, self.settings, of_steps)
        count = int(found.clusters.max()) + 1
        names = self._names(source, images.features, found.clusters)
        metrics = {"largest_cluster": found.clusters.bincount().max().item() / len(found.clusters)}
        columns: dict[str, Tensor] = {}
        labelled = [row for row, record in enumerate(images.records) if record.label is not None]
        if labelled:
            labels = torch.tensor([images.records[row].label for row in labelled])
            plain = k_means(images.features, count, self.settings.seed)
            for prefix, clusters in (("", found.clusters), ("k_means/", plain)):
                metrics |= {f"{prefix}{key}": value for key, value in _agreement(labels, clusters[labelled]).items()}
            if names and self.class_names:
                given = [names[cluster] for cluster in found.clusters[labelled].tolist()]
                columns = name_columns(given, [self.class_names[label] for label in labels.tolist()], source)
                metrics |= {key: column.mean().item() for key, column in columns.items()}
        return Evaluation(
            metrics=metrics,
            intervals={},
            protocol={
                "images": IMAGES,
                "method": "CPP",
                "settings": vars(self.settings),
                "num_clusters": "given" if len(self.num_clusters) == 1 else "shortest coding length",
                "coding_length": {str(number): round(length, 3) for number, length in found.lengths.items()},
                "vocabulary": len(self.vocabulary),
                "template": self.template,
                "cluster_accuracy": "best assignment of clusters to classes",
            },
            counts={
                "images": len(images.records),
                "labelled_images": len(labelled),
                "clusters": count,
                "unreadable_images": len(images.unreadable),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in images.records],
                    "cluster": found.clusters.numpy(),
                    "name": [names[cluster] if names else "" for cluster in found.clusters.tolist()],
                }
            ),
            figures={"unreadable_images": images.unreadable, "cluster_names": tuple(names)},
        )

    def _names(self, source: EmbeddingSource, features: Tensor, clusters: Tensor) -> list[str]:
        if not self.vocabulary:
            return []
        words = list(dict.fromkeys(self.vocabulary))
        vectors = source.embed_texts([self.template.replace("{}", word) for word in words])
        check_finite(vectors, words, "texts")
        return [words[row] for row in name_clusters(features, clusters, vectors)]


def cluster_images(
    features: Tensor, num_clusters: Sequence[int], settings: CppSettings, progress: Progress | None = None
) -> Clustered:
    """Clusters of features (N,D), unit norm.

    Args:
        features: of the model.
        num_clusters: one number, or several of which the shortest coding length chooses.
        settings: of the head.
        progress: called with (done, total) training steps.

    Differs: beyond 3000 images, these are drawn by the seed and clustered, and each other image joins the cluster
    whose mean feature is nearest; the released scripts average ten pools of 1500.
    """
    head = train_head(features, settings, progress)
    out = head.run(features)
    generator = torch.Generator().manual_seed(settings.seed)
    pool = torch.randperm(len(features), generator=generator)[:_POOL].sort().values
    member = membership(out.codes[pool], settings.eta)
    lengths = {}
    if len(num_clusters) > 1:
        lengths = best_number(out.features[pool], member, num_clusters, settings.seed)
    count = min(lengths, key=lambda number: lengths[number]) if lengths else num_clusters[0]
    own = spectral_clusters(member, count, settings.seed)
    sums = torch.zeros(count, out.features.shape[1]).index_add_(0, own, out.features[pool])
    clusters = (out.features @ torch.nn.functional.normalize(sums, dim=1).T).argmax(1)
    clusters[pool] = own
    return Clustered(clusters, lengths)


def name_clusters(features: Tensor, clusters: Tensor, words: Tensor) -> list[int]:
    """The word of each cluster: images vote with the probabilities of their five nearest words.

    Args:
        features: (N,D) unit norm.
        clusters: (N,) int64, from 0.
        words: (V,D) unit norm.

    Returns:
        For each cluster a row of `words`.

    Source: Chu et al. 2024, arXiv:2306.05272, section 3.4; released code CPP (scale 100, five words an image).
    """
    votes = torch.zeros(int(clusters.max()) + 1, len(words))
    for start in range(0, len(features), 1024):
        best = (_SCALE * features[start : start + 1024] @ words.T).softmax(1).topk(min(_TOP, len(words)), dim=1)
        rows = clusters[start : start + 1024, None].expand_as(best.indices)
        votes.index_put_((rows, best.indices), best.values, accumulate=True)
    return [int(row) for row in votes.argmax(1)]


def _agreement(labels: Tensor, clusters: Tensor) -> dict[str, float]:
    from sklearn.metrics import normalized_mutual_info_score

    shared = normalized_mutual_info_score(labels.numpy(), clusters.numpy())
    return {"cluster_accuracy": cluster_accuracy(labels, clusters), "normalized_mutual_information": float(shared)}
