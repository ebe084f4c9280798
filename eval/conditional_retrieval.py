"""GeneCIS: the same reference image asks for different targets under different conditions.

ConditionalRetrievalEvaluator(read_genecis("genecis", images)).run(source).metrics["tasks/recall@1"]

With a `Combiner` trained on triplets of captions, what it finds stands beside the mean of image and condition.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.combiner import Combiner
from eval.crops import Crop, embed_crops, genecis_cut
from eval.features import IMAGES, EmbeddingSource, embed_texts, parts_of
from eval.metrics import bootstrap_interval
from eval.metrics.ranking import TIE_TOLERANCE
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.errors import DataError

KS = (1, 2, 3)


class ConditionalQuery(NamedTuple):
    """A reference and a condition; one target among distractors."""

    key: str
    reference: Crop
    condition: str
    target: Crop
    distractors: tuple[Crop, ...]
    task: str


class ConditionalSet(NamedTuple):
    """Queries, and what was left out."""

    queries: tuple[ConditionalQuery, ...]
    how: str
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class ConditionalRetrievalEvaluator(Evaluator):
    """Recall@1, 2 and 3 within each query's own gallery, by image, by condition and by both.

    Attributes:
        data: the queries.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) over images and texts.
        combiner: a trained head that makes queries too; of the same model.
    """

    data: ConditionalSet
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None
    combiner: Combiner | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no query, or one without a distractor.
        """
        if not self.data.queries or not all(query.distractors for query in self.data.queries):
            raise DataError(f"{len(self.data.queries)} queries; expected at least one, each with a distractor.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, rank, count.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `recall@K` of the mean of image and condition, the same behind `image_only/`, `text_only/` and each
            task; `tasks/recall@1` is the mean over tasks, the benchmark's headline. With a combiner all of it again
            behind `combiner/`.

        Raises:
            DataError: no readable image.
            GalleryError: features that are not finite.

        Source: Vaze et al. 2023, "GeneCIS", CVPR, arXiv:2306.07969; its code.
        Differs: a distractor that ties with the target counts as before it, so equal scores give 0 (the released code
        puts the target first in every gallery). Image and condition are averaged at unit norm, since a stored text
        feature has no length; the released code averages them before that.
        """
        crops = [crop for query in self.data.queries for crop in (query.reference, query.target, *query.distractors)]
        texts = list(dict.fromkeys(query.condition for query in self.data.queries))
        of_images, of_texts = parts_of(self.progress, len({crop.key for crop in crops}), len(texts))
        images = embed_crops(source, crops, self.batch_size, self.workers, of_images, genecis_cut)
        text = embed_texts(source, texts, of_texts)
        text_row = {one: row for row, one in enumerate(texts)}
        kept = [
            query
            for query in self.data.queries
            if all(crop.key in images.rows for crop in (query.reference, query.target, *query.distractors))
        ]
        if not kept:
            raise DataError("No query has all of its images.")
        ranks = torch.tensor(
            [self._ranks(query, images.features, images.rows, text[text_row[query.condition]]) for query in kept]
        )
        sides = ("", "image_only/", "text_only/", *(["combiner/"] if self.combiner else []))
        columns = {f"{side}recall@{k}": (ranks[:, n] <= k).double() for n, side in enumerate(sides) for k in KS}
        values = torch.stack(list(columns.values()), 1)
        low, high = bootstrap_interval(values, seed=self.seed)
        metrics = {key: column.mean().item() for key, column in columns.items()}
        tasks = sorted({query.task for query in kept})
        for side in ("", *sides[3:]):
            for task in tasks:
                of_task = torch.tensor([query.task == task for query in kept])
                own = {f"{side}{task}/recall@{k}": columns[f"{side}recall@{k}"][of_task].mean().item() for k in KS}
                metrics |= own
            metrics[f"{side}tasks/recall@1"] = sum(metrics[f"{side}{task}/recall@1"] for task in tasks) / len(tasks)
        sizes = Counter(1 + len(query.distractors) for query in kept)
        return Evaluation(
            metrics=metrics,
            intervals={key: (low[place].item(), high[place].item()) for place, key in enumerate(columns)},
            protocol={
                "images": IMAGES,
                "data": self.data.how,
                "query": "unit mean of unit image and condition",
                "crop": "the box with 0.7 of its size left and above, on a black square",
                "ties": "against the target",
                "gallery_sizes": {str(size): count for size, count in sorted(sizes.items())},
                "chance_recall@1": round(sum(count / size for size, count in sizes.items()) / len(kept), 6),
                "interval": f"95%, percentile bootstrap, 1000 resamples of queries, seed {self.seed}",
            },
            counts={
                "queries": len(kept),
                "images": len(images.rows),
                "tasks": len(tasks),
                "unreadable_images": len(images.unreadable),
                "queries_of_unreadable_images": len(self.data.queries) - len(kept),
                **dict(self.data.left_out),
            },
            per_item=pa.table(
                {
                    "key": [query.key for query in kept],
                    "task": [query.task for query in kept],
                    "condition": [query.condition for query in kept],
                    "rank": ranks[:, 0].numpy(),
                    "rank_image_only": ranks[:, 1].numpy(),
                    "rank_text_only": ranks[:, 2].numpy(),
                    **({"rank_combiner": ranks[:, 3].numpy()} if self.combiner else {}),
                }
            ),
            figures={"unreadable_images": images.unreadable},
        )

    def _ranks(self, query: ConditionalQuery, features: Tensor, rows: dict[str, int], text: Tensor) -> list[int]:
        """The target's place, from 1, by both, by the image, by the condition, by the combiner where there is one."""
        image = features[rows[query.reference.key]]
        gallery = features[[rows[crop.key] for crop in (query.target, *query.distractors)]]
        asked = torch.stack([F.normalize(image + text, dim=0), image, text])
        if self.combiner is not None:
            asked = torch.cat([asked, self.combiner.combine(image[None], text[None])])
        scores = asked @ gallery.T
        return [1 + int(before) for before in (scores[:, 1:] >= scores[:, :1] - TIE_TOLERANCE).sum(1)]
