"""Naming images without a list of classes: CaSED, and how well the names fit the true ones where these are known.

VocabularyFreeEvaluator(records, class_names, captions).run(source).metrics["cluster_accuracy"]
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, embed_records, embed_texts, parts_of
from eval.labelled import check_labels
from eval.metrics import bootstrap_interval, cluster_accuracy
from vlkit.addons.words import nouns_of
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError
from vlkit.index.faiss_index import EmbeddingIndex

NO_NAME = "object"
# Images named at once.
_ROWS = 1024


class NamingSource(EmbeddingSource, Protocol):
    """A source of features that knows its scale."""

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosine."""


class Named(NamedTuple):
    """The name of an image, and what it was chosen from."""

    name: str
    score: float
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class CaSED:
    """Candidate search from external data: nearest captions, their nouns, the best of these.

    Attributes:
        texts: (M,) captions to search, of images that are not named.
        captions: (M,D) their features, unit norm.
        num_captions: nearest captions of an image.
        alpha: weight of the image's own similarity; the rest is that of the captions' centroid.
        min_captions: captions out of the nearest ones that must hold a candidate.
        template: of a candidate.

    Source: Conti et al. 2023, "Vocabulary-free Image Classification", NeurIPS, arXiv:2306.00917; released code vic
    (10 captions, alpha 0.7 in its configuration, both softmaxes at the model's own logit scale over the image's own
    candidates, no candidate: "object").
    Differs: candidates are nouns found by rule (`vlkit.addons.words`), where the released code takes nouns,
    adjectives and participles of a tagger; captions are whatever is given, not its database.
    """

    texts: Sequence[str]
    captions: Tensor
    num_captions: int = 10
    alpha: float = 0.7
    min_captions: int = 2
    template: str = "a photo of a {}"

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a setting out of range.
            DataError: fewer captions than are searched for.
        """
        if not 0 <= self.alpha <= 1 or self.min_captions < 1 or self.template.count("{}") != 1:
            raise ConfigError(
                f"alpha {self.alpha}, min_captions {self.min_captions}, template {self.template!r}: expected alpha "
                "within 0 and 1, min_captions from 1, and a template with one {}."
            )
        if len(self.texts) != len(self.captions) or not 1 <= self.num_captions <= len(self.texts):
            raise DataError(
                f"{self.num_captions} captions are to be found among {len(self.texts)}; give more captions."
            )

    def name_images(self, images: Tensor, source: NamingSource, progress: Progress | None = None) -> list[Named]:
        """Names of images (N,D), unit norm; one look-up in an exact index, and the candidates' texts."""
        ids = [str(row) for row in range(len(self.texts))]
        index = EmbeddingIndex.build(self.captions, ids, kind="flat")
        named: list[Named] = []
        for start in range(0, len(images), _ROWS):
            chunk = images[start : start + _ROWS]
            near = [[int(row) for row in line] for line in index.search(chunk, self.num_captions).ids]
            candidates = [self._candidates(rows) for rows in near]
            words = sorted({word for line in candidates for word in line})
            vectors = source.embed_texts([self.template.replace("{}", word) for word in words]) if words else None
            for image, rows, line in zip(chunk, near, candidates, strict=True):
                named.append(self._chosen(image, rows, line, words, vectors, source.logit_scale))
            if progress:
                progress(start + len(chunk), len(images))
        return named

    def _candidates(self, rows: list[int]) -> list[str]:
        counts = Counter(word for row in rows for word in nouns_of(self.texts[row]))
        return sorted(word for word, count in counts.items() if count >= self.min_captions)

    def _chosen(
        self, image: Tensor, rows: list[int], line: list[str], words: list[str], vectors: Tensor | None, scale: float
    ) -> Named:
        if not line or vectors is None:
            return Named(NO_NAME, 0.0, ())
        own = vectors[[words.index(word) for word in line]]
        centroid = F.normalize(self.captions[rows].mean(0), dim=0)
        by_image, by_captions = (scale * (own @ image)).softmax(0), (scale * (own @ centroid)).softmax(0)
        score = self.alpha * by_image + (1 - self.alpha) * by_captions
        best = int(score.argmax())
        return Named(line[best], score[best].item(), tuple(line))


@dataclass(frozen=True)
class VocabularyFreeEvaluator(Evaluator):
    """How well names that nobody listed fit the classes.

    Attributes:
        records: images; labels, where they have any, only measure.
        class_names: (C,) true names; empty where there are no labels.
        texts: captions of other images, the data that names come from.
        num_captions, alpha, template: of CaSED.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) over images and texts.
    """

    records: Sequence[Record]
    class_names: Sequence[str]
    texts: Sequence[str]
    num_captions: int = 10
    alpha: float = 0.7
    template: str = "a photo of a {}"
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no caption, or a label without a name.
        """
        if not self.texts:
            raise DataError("There is no caption to take names from.")
        check_labels(self.records, len(self.class_names))

    def run(self, source: NamingSource, pipeline: None = None) -> Evaluation:
        """Embed, name, compare.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `named` (share of images with a candidate) and, with labels, `cluster_accuracy` (names as clusters,
            best assignment to classes), `semantic_iou` (words shared), `semantic_similarity` (cosine of both names'
            text features), `exact_match`; `per_item` one row an image, with its name.

        Raises:
            DataError: no readable image, or too few captions.
            GalleryError: features that are not finite.

        Differs: the paper measures semantic similarity with a model of sentences; here it is the evaluated model's own
        text features, so it compares add-ons and captions, not models.
        """
        texts = list(dict.fromkeys(self.texts))
        of_images, of_texts = parts_of(self.progress, len(self.records), len(texts))
        images = embed_records(source, self.records, self.batch_size, self.workers, of_images)
        captions = embed_texts(source, texts, of_texts)
        method = CaSED(texts, captions, self.num_captions, self.alpha, template=self.template)
        named = method.name_images(images.features, source)
        found = [one.name for one in named]
        metrics = {"named": sum(name != NO_NAME for name in found) / len(found)}
        intervals: dict[str, tuple[float, float]] = {}
        labelled = [row for row, record in enumerate(images.records) if record.label is not None]
        labels = torch.tensor([images.records[row].label for row in labelled], dtype=torch.int64)
        if labelled:
            given = [found[row] for row in labelled]
            columns = name_columns(given, [self.class_names[label] for label in labels.tolist()], source)
            place = {name: row for row, name in enumerate(dict.fromkeys(given))}
            metrics["cluster_accuracy"] = cluster_accuracy(labels, torch.tensor([place[name] for name in given]))
            metrics |= {key: column.mean().item() for key, column in columns.items()}
            low, high = bootstrap_interval(torch.stack(list(columns.values()), 1), seed=self.seed)
            intervals = {key: (low[row].item(), high[row].item()) for row, key in enumerate(columns)}
        true = ["" if record.label is None else self.class_names[record.label] for record in images.records]
        return Evaluation(
            metrics=metrics,
            intervals=intervals,
            protocol={
                "images": IMAGES,
                "method": "CaSED",
                "vocabulary": "nouns of the captions given, by rule",
                "num_captions": self.num_captions,
                "alpha": self.alpha,
                "template": self.template,
                "semantic_similarity": "cosine of the evaluated model's own text features",
                "interval": f"95%, percentile bootstrap, 1000 resamples of images, seed {self.seed}",
            },
            counts={
                "images": len(images.records),
                "labelled_images": len(labelled),
                "classes": len(self.class_names),
                "captions": len(texts),
                "names": len(set(found)),
                "images_without_candidate": found.count(NO_NAME),
                "unreadable_images": len(images.unreadable),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in images.records],
                    "class": true,
                    "name": found,
                    "score": [one.score for one in named],
                    "candidates": [", ".join(one.candidates) for one in named],
                }
            ),
            figures={"unreadable_images": images.unreadable},
        )


def name_columns(found: Sequence[str], true: Sequence[str], source: EmbeddingSource) -> dict[str, Tensor]:
    """Of each item (N,): `semantic_iou`, `semantic_similarity` and `exact_match` of its name with the true one."""
    texts = list(dict.fromkeys((*found, *true)))
    vectors, row = source.embed_texts(texts), {text: place for place, text in enumerate(texts)}
    pairs = [(row[one], row[two]) for one, two in zip(found, true, strict=True)]
    similarity = (vectors[[one for one, _ in pairs]] * vectors[[two for _, two in pairs]]).sum(1).double()
    words = [(set(one.lower().split()), set(two.lower().split())) for one, two in zip(found, true, strict=True)]
    return {
        "semantic_iou": torch.tensor([len(one & two) / len(one | two) for one, two in words], dtype=torch.float64),
        "semantic_similarity": similarity,
        "exact_match": torch.tensor([float(one == two) for one, two in words], dtype=torch.float64),
    }
