"""Composed retrieval: an image and words ask for another image; mAP and recall.

ComposedRetrievalEvaluator(read_cirr("cirr")).run(source, Pipeline([WeiCom(share=0.3)])).metrics["recall@1"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, embed_records, embed_texts, parts_of
from eval.metrics import PositivePositions, bootstrap_interval, positive_positions
from vlkit.addons.base import Merge
from vlkit.addons.merges.arithmetic import Arithmetic
from vlkit.addons.merges.freedom import FreeDom
from vlkit.addons.pipeline import Pipeline
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError, GalleryError
from vlkit.features.source import FeatureSource

# Scores of one part held at once: 32 MB of float32.
_CELLS = 8_000_000


class ComposedQuery(NamedTuple):
    """An image and words, and the gallery images that are right."""

    key: str
    image: Record
    text: str
    right: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # taken out of its gallery
    tag: str = ""  # results are also given for each tag
    subset: tuple[str, ...] = ()  # it is also asked among these alone


class ComposedSet(NamedTuple):
    """Queries and the images they are asked of."""

    queries: tuple[ComposedQuery, ...]
    gallery: tuple[Record, ...]
    how: str
    left_out: tuple[tuple[str, int], ...] = ()


class _Asked(NamedTuple):
    """Queries whose images could be read."""

    queries: list[ComposedQuery]
    images: Tensor  # (Q,D)
    texts: Tensor  # (Q,D)
    gallery: Tensor  # (N,D)
    place: Mapping[str, int]


@dataclass(frozen=True)
class ComposedRetrievalEvaluator(Evaluator):
    """Rankings of a gallery by image and words together, and by each alone.

    Attributes:
        data: queries and gallery.
        ks: the K of `hit@K` and `recall@K`; none may exceed a query's gallery.
        subset_ks: the K of `subset_hit@K`, where queries have subsets (CIRR).
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) images.
    """

    data: ComposedSet
    ks: tuple[int, ...] = (1, 5, 10)
    subset_ks: tuple[int, ...] = (1, 2, 3)
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no query, or one that names images the gallery lacks or has nothing to find.
        """
        keys = {record.key for record in self.data.gallery}
        if not self.data.queries:
            raise DataError("There is no query.")
        for query in self.data.queries:
            unknown = [key for key in (*query.right, *query.ignored, *query.subset) if key not in keys]
            if unknown or not query.right:
                raise DataError(
                    f"Query {query.key!r} has {len(query.right)} right answers and names {len(unknown)} images the "
                    f"gallery lacks{f' (first: {unknown[0]!r})' if unknown else ''}; each needs a right one in it."
                )

    def run(self, source: FeatureSource, pipeline: Pipeline | None = None) -> Evaluation:
        """Embed, merge, rank, count.

        Args:
            source: the model.
            pipeline: fitted; its merge joins the scores of words and image. Default: their mean.

        Returns:
            Metrics `mean_average_precision`, `recall@K` (share of right answers), `hit@K` (any right answer),
            `subset_hit@K`; the first of these behind `image_only/`, `text_only/` and each tag; `tags/...` is the
            mean over tags.

        Raises:
            ConfigError: an add-on that is no merge, or one that is not fitted.
            DataError: no readable image.
            GalleryError: K above the gallery, or features that are not finite.
        """
        merge = _merge_of(pipeline)
        asked, unreadable, missing = self._embed(source)
        sides: dict[str, Merge] = {"": merge, "image_only/": Arithmetic("image"), "text_only/": Arithmetic("text")}
        columns: dict[str, Tensor] = {}
        for prefix, one in sides.items():
            scores = _Scores(one, asked, source)
            found = self._positions(scores, asked)
            columns[f"{prefix}mean_average_precision"] = found.average_precision()
            for k in self.ks:
                columns |= {f"{prefix}hit@{k}": found.hit(k), f"{prefix}recall@{k}": found.recall(k)}
            if not prefix and all(query.subset for query in asked.queries):
                within = self._positions(scores, asked, subset=True)
                columns |= {f"subset_hit@{k}": within.hit(k) for k in self.subset_ks}
        values = torch.stack(list(columns.values()), dim=1)
        low, high = bootstrap_interval(values, seed=self.seed)
        return Evaluation(
            metrics={key: values[:, place].mean().item() for place, key in enumerate(columns)}
            | self._by_tag(asked.queries, columns["mean_average_precision"]),
            intervals={key: (low[place].item(), high[place].item()) for place, key in enumerate(columns)},
            protocol={
                "images": IMAGES,
                "data": self.data.how,
                "merge": {"name": merge.name, **merge.settings()},
                "recall": "share of right answers among the first K; hit: any of them",
                "ties": "within 1e-6 x max(1, |score|); the expectation over their random order",
                "ks": list(self.ks),
                "interval": f"95%, percentile bootstrap, 1000 resamples of queries, seed {self.seed}",
            },
            counts={
                "queries": len(asked.queries),
                "images": len(asked.gallery),
                "unreadable_images": len(unreadable),
                "queries_of_unreadable_images": missing,
                **dict(self.data.left_out),
            },
            per_item=pa.table(
                {
                    "key": [query.key for query in asked.queries],
                    "text": [query.text for query in asked.queries],
                    "tag": [query.tag for query in asked.queries],
                    **{key: column.numpy() for key, column in columns.items()},
                }
            ),
            figures={"unreadable_images": unreadable},
        )

    def _embed(self, source: FeatureSource) -> tuple[_Asked, tuple[tuple[str, str], ...], int]:
        asked = list({query.image.key: query.image for query in self.data.queries}.values())
        texts = list(dict.fromkeys(query.text for query in self.data.queries))
        of_gallery, of_queries, of_texts = parts_of(self.progress, len(self.data.gallery), len(asked), len(texts))
        gallery = embed_records(source, self.data.gallery, self.batch_size, self.workers, of_gallery)
        images = embed_records(source, asked, self.batch_size, self.workers, of_queries)
        text = embed_texts(source, texts, of_texts)
        place = {record.key: row for row, record in enumerate(gallery.records)}
        image_row = {record.key: row for row, record in enumerate(images.records)}
        text_row = {one: row for row, one in enumerate(texts)}
        kept = [
            query
            for query in self.data.queries
            if query.image.key in image_row and any(key in place for key in query.right)
        ]
        if not kept:
            raise DataError("No query has its image and a right answer among the images that could be read.")
        found = _Asked(
            kept,
            images.features[[image_row[query.image.key] for query in kept]],
            text[[text_row[query.text] for query in kept]],
            gallery.features,
            place,
        )
        unreadable = tuple(dict.fromkeys((*gallery.unreadable, *images.unreadable)))
        return found, unreadable, len(self.data.queries) - len(kept)

    def _positions(self, scores: "_Scores", asked: _Asked, subset: bool = False) -> PositivePositions:
        everything = torch.ones(len(asked.gallery), dtype=torch.bool)
        relevant, ignored = [], []
        for query in asked.queries:
            right = _rows(query.right, asked.place)
            absent = ~everything
            if subset:
                absent = everything.clone()
                absent[_rows(query.subset, asked.place)] = False
            absent[_rows(query.ignored, asked.place)] = True
            right = right[~absent[right]]
            relevant.append(right)
            ignored.append(absent.nonzero().flatten())
        smallest = len(asked.gallery) - max(len(one) for one in ignored)
        if not subset and max(self.ks) > smallest:
            raise GalleryError(f"K is {max(self.ks)}, but a query has only {smallest} images to search. Lower K.")
        # Scores follow from a query's number, which is handed through in place of features.
        numbers = torch.arange(len(asked.queries), dtype=torch.float64)[:, None].expand(-1, asked.gallery.shape[1])
        rows = max(1, _CELLS // len(asked.gallery))
        return positive_positions(
            numbers,
            asked.gallery,
            relevant,
            ignored=ignored,
            score=lambda chunk, _: scores.of(chunk[:, 0].long()),
            rows=rows,
        )

    def _by_tag(self, queries: Sequence[ComposedQuery], values: Tensor) -> dict[str, float]:
        tags = sorted({query.tag for query in queries} - {""})
        if not tags:
            return {}
        means = {
            f"{tag}/mean_average_precision": values[torch.tensor([query.tag == tag for query in queries])].mean().item()
            for tag in tags
        }
        return means | {"tags/mean_average_precision": sum(means.values()) / len(means)}


class _Scores:
    """Merged scores of some queries against the whole gallery."""

    def __init__(self, merge: Merge, asked: _Asked, source: FeatureSource) -> None:
        self.merge, self.asked = merge, asked
        self.prompts: list[Tensor] = []
        self.words: Tensor | None = None
        if isinstance(merge, FreeDom):
            found = merge.inverted(asked.images, asked.gallery)
            texts = found.prompts([query.text for query in asked.queries])
            self.prompts = [source.embed_texts(column) for column in texts]
            self.words = found.weights

    def of(self, rows: Tensor) -> Tensor:
        """(q,N) of queries (q,)."""
        gallery = self.asked.gallery
        if isinstance(self.merge, FreeDom):
            assert self.words is not None
            merge = self.merge.for_weights(self.words[rows])
            return merge.merge([column[rows] @ gallery.T for column in self.prompts])
        return self.merge.merge([self.asked.texts[rows] @ gallery.T, self.asked.images[rows] @ gallery.T])


def _merge_of(pipeline: Pipeline | None) -> Merge:
    if pipeline is None or not pipeline.addons:
        return Arithmetic()
    if pipeline.merge is None or len(pipeline.addons) > 1:
        names = ", ".join(addon.name for addon in pipeline.addons)
        raise ConfigError(f"Composed retrieval takes one merge (arithmetic, weicom, freedom), found {names}.")
    if not pipeline.fitted:
        raise ConfigError(f"{pipeline.merge.name} is not fitted; fit the pipeline first.")
    return pipeline.merge


def _rows(keys: Sequence[str], place: Mapping[str, int]) -> Tensor:
    return torch.tensor([place[key] for key in dict.fromkeys(keys) if key in place], dtype=torch.int64)
