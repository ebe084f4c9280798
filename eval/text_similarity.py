"""Text-text similarity: against human scores of pairs, and as retrieval among captions of the same image.

ScoredPairsEvaluator(read_scored_pairs("sts.tsv")).run(embedder).metrics["spearman"]
SameImageCaptionsEvaluator(source.records).run(embedder).metrics["cmc@1"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from eval.features import EmbeddingSource, embed_texts
from eval.image_retrieval import query_columns
from eval.metrics import SameLabel, bootstrap_interval, kendall_tau, pearson, positive_positions, spearman
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record, text_to_image
from vlkit.data.sources.delimited import read_table
from vlkit.errors import DataError, GalleryError

_RESAMPLES = 200


class ScoredPair(NamedTuple):
    """Two texts and how alike people find them."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class ScoredPairsEvaluator(Evaluator):
    """Correlation of the cosine of two texts with a human score (STS form).

    Attributes:
        pairs: at least three, not all of one score.
        seed: of the bootstrap.
        progress: called with (done, total) texts.
    """

    pairs: Sequence[ScoredPair]
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: too few pairs, or all of one score.
        """
        if len(self.pairs) < 3 or len({pair.score for pair in self.pairs}) < 2:
            raise DataError(f"{len(self.pairs)} scored pairs of {len({p.score for p in self.pairs})} distinct scores.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed every text once, correlate.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics `spearman`, `pearson`, `kendall_tau_b`; `per_item` one row a pair.

        Raises:
            GalleryError: features that are not finite.
        """
        texts = list(dict.fromkeys(text for pair in self.pairs for text in (pair.first, pair.second)))
        features = embed_texts(source, texts, self.progress)
        row = {text: place for place, text in enumerate(texts)}
        first = features[[row[pair.first] for pair in self.pairs]].double()
        second = features[[row[pair.second] for pair in self.pairs]].double()
        cosine = (first * second).sum(1).numpy()
        scores = np.array([pair.score for pair in self.pairs])
        return Evaluation(
            metrics={
                "spearman": spearman(cosine, scores),
                "pearson": pearson(cosine, scores),
                "kendall_tau_b": kendall_tau(cosine, scores),
            },
            intervals={"spearman": self._interval(cosine, scores)},
            protocol={
                "similarity": "cosine",
                "interval": f"95%, percentile bootstrap, {_RESAMPLES} resamples of pairs, seed {self.seed}",
            },
            counts={"pairs": len(self.pairs), "texts": len(texts)},
            per_item=pa.table(
                {
                    "first": [pair.first for pair in self.pairs],
                    "second": [pair.second for pair in self.pairs],
                    "score": scores,
                    "similarity": cosine,
                }
            ),
        )

    def _interval(self, cosine: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[float, float]:
        generator = np.random.Generator(np.random.Philox(self.seed))
        values = []
        for _ in range(_RESAMPLES):
            rows = generator.integers(0, len(scores), len(scores))
            if len(np.unique(scores[rows])) > 1:
                values.append(spearman(cosine[rows], scores[rows]))
        low, high = np.quantile(values, [0.025, 0.975]).tolist()
        return low, high


@dataclass(frozen=True)
class SameImageCaptionsEvaluator(Evaluator):
    """Each caption looks for the other captions of its image among all captions; no image is embedded.

    Attributes:
        records: images with captions; those with one caption are found by nobody and ask for nothing.
        ks: the K of `cmc@K` and `recall@K`.
        seed: of the bootstrap.
        progress: called with (done, total) texts.
    """

    records: Sequence[Record]
    ks: tuple[int, ...] = (1, 5, 10)
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no image has two captions.
        """
        if not any(len(record.captions) > 1 for record in self.records):
            raise DataError(f"None of the {len(self.records)} images has two captions; there is nothing to find.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, rank, count.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics as `ImageRetrievalEvaluator`; `per_item` one row a caption.

        Raises:
            GalleryError: K above the other captions, or features that are not finite.
        """
        captions = [text for record in self.records for text in record.captions]
        if max(self.ks) >= len(captions):
            raise GalleryError(f"K is {max(self.ks)}, but each caption has {len(captions) - 1} others. Ask for fewer.")
        features = embed_texts(source, captions, self.progress)
        owner = torch.tensor(text_to_image(self.records))
        themselves = list(torch.arange(len(captions)).split(1))
        relevant = SameLabel(owner, owner, range(len(captions)))
        positions = positive_positions(features, features, relevant, ignored=themselves)
        columns = query_columns(positions, self.ks)
        values = torch.stack([positions.answered(column) for column in columns.values()], dim=1)
        units = positions.answered(owner)
        low, high = bootstrap_interval(values, units=units, seed=self.seed)
        return Evaluation(
            metrics={key: values[:, place].mean().item() for place, key in enumerate(columns)},
            intervals={key: (low[place].item(), high[place].item()) for place, key in enumerate(columns)},
            protocol={
                "right": "other captions of the same image",
                "gallery": "all other captions",
                "similarity": "cosine",
                "ks": list(self.ks),
                "interval": f"95%, percentile bootstrap, 1000 resamples of images, seed {self.seed}",
            },
            counts={
                "texts": len(captions),
                "images": sum(bool(record.captions) for record in self.records),
                "texts_without_another": int((positions.num_right == 0).sum()),
                "images_without_captions": sum(not record.captions for record in self.records),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in self.records for _ in record.captions],
                    "caption": captions,
                    **{key: column.numpy() for key, column in columns.items()},
                }
            ),
        )


def read_scored_pairs(
    file: str | Path, first: str = "sentence1", second: str = "sentence2", score: str = "score"
) -> list[ScoredPair]:
    """Pairs of texts with scores out of a CSV or TSV table with a header, such as STS-B's.

    Args:
        file: `.csv` or `.tsv`.
        first: column of one text.
        second: column of the other.
        score: column of the human score.

    Raises:
        DataError: unreadable, no such column, or a score that is no number.
    """
    pairs = []
    for where, row in read_table(file, first, second, score):
        try:
            value = float(row[score])
            if not np.isfinite(value):
                raise ValueError
        except (TypeError, ValueError):
            raise DataError(f"{where}: {score} is {row[score]!r}; expected a number.") from None
        pairs.append(ScoredPair(str(row[first]), str(row[second]), value))
    return pairs
