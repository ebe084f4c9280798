"""Image-to-image retrieval by labels or by lists of right answers: mAP, CMC, recall and MAR@10.

ImageRetrievalEvaluator(source.records).run(embedder).metrics["mean_average_precision"]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, embed_records, parts_of
from eval.metrics import PositivePositions, SameLabel, bootstrap_interval, expected_rank, positive_positions
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.data.sources.annotated import read_lines
from vlkit.errors import DataError, GalleryError


class RelevanceList(NamedTuple):
    """Of one query: gallery keys that are right, and keys that are taken out of its gallery."""

    relevant: tuple[str, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageRetrievalEvaluator(Evaluator):
    """Find images of the same class, or those a list names.

    Attributes:
        gallery: the images searched.
        queries: None: every gallery image asks for the others, itself left out.
        lists: right answers by query key; None: the images of the query's label.
        ks: the K of `cmc@K` and `recall@K`; none may exceed a query's gallery.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) images.
    """

    gallery: Sequence[Record]
    queries: Sequence[Record] | None = None
    lists: Mapping[str, RelevanceList] | None = None
    ks: tuple[int, ...] = (1, 5, 10)
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: images without a label where no list is given, or a list that names unknown images.
        """
        asked = self.gallery if self.queries is None else self.queries
        if self.lists is None:
            bare = [record.key for record in (*self.gallery, *(self.queries or ())) if record.label is None]
            if bare:
                raise DataError(f"{len(bare)} images have no class (first: {bare[0]}); give classes, or --relevance.")
            return
        if not self.lists:
            raise DataError("The list of right answers is empty.")
        known, keys = {record.key for record in asked}, {record.key for record in self.gallery}
        unknown = [key for key in self.lists if key not in known]
        unknown += [key for one in self.lists.values() for key in (*one.relevant, *one.ignored) if key not in keys]
        if unknown:
            raise DataError(f"The lists name {len(unknown)} images that are not there (first: {unknown[0]!r}).")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, rank, count.

        Args:
            source: the model; one that only knows images will do.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics `mean_average_precision`, `r_precision`, `ndcg@10`, `mar@10`, `cmc@K`, `recall@K`, `median_rank`,
            over queries that have a right answer; `per_item` one row a query.

        Raises:
            DataError: no readable image, or no query with a right answer.
            GalleryError: K above the gallery, or features that are not finite.
        """
        asked = [] if self.queries is None else self.queries
        of_gallery, of_queries = parts_of(self.progress, len(self.gallery), len(asked))
        gallery = embed_records(source, self.gallery, self.batch_size, self.workers, of_gallery)
        queries = gallery
        if self.queries is not None:
            queries = embed_records(source, asked, self.batch_size, self.workers, of_queries)
        unreadable = gallery.unreadable + (() if queries is gallery else queries.unreadable)
        rows, features = list(queries.records), queries.features
        if self.lists is not None:
            listed = [row for row, record in enumerate(rows) if record.key in self.lists]
            rows, features = [rows[row] for row in listed], features[listed]
        relevant, ignored = self._right(rows, gallery.records)
        smallest = len(gallery.records) - max((len(one) for one in ignored), default=0)
        if not rows or max(self.ks) > smallest:
            raise GalleryError(
                f"K is {max(self.ks)}, but a gallery has {smallest} images for {len(rows)} queries. "
                "Ask for fewer results, or give more images."
            )
        positions = positive_positions(features, gallery.features, relevant, ignored=ignored)
        alone = int((positions.num_right == 0).sum())
        if alone == len(rows):
            raise DataError("No query has a right answer in the gallery; nothing can be measured.")
        columns = query_columns(positions, self.ks)
        values = torch.stack([positions.answered(column) for column in columns.values()], dim=1)
        low, high = bootstrap_interval(values, seed=self.seed)
        rank = expected_rank(positions.first())
        return Evaluation(
            metrics={key: values[:, place].mean().item() for place, key in enumerate(columns)}
            | {"median_rank": positions.answered(rank).median().item()},
            intervals={key: (low[place].item(), high[place].item()) for place, key in enumerate(columns)},
            protocol={
                "images": IMAGES,
                "right": "same class" if self.lists is None else "given by lists",
                "gallery": "all other images" if self.queries is None else "a set of its own",
                "similarity": "cosine",
                "ties": "within 1e-6 x max(1, |score|); the expectation over their random order",
                "cmc": "any right answer among the first K",
                "recall": "share of right answers among the first K; mar@10 is recall@10",
                "ks": list(self.ks),
                "interval": f"95%, percentile bootstrap, 1000 resamples of queries, seed {self.seed}",
            },
            counts={
                "queries": len(rows),
                "images": len(gallery.records),
                "queries_without_right_answer": alone,
                "unreadable_images": len(unreadable),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in rows],
                    "right_answers": positions.num_right.numpy(),
                    "rank": rank.numpy(),
                    **{key: column.numpy() for key, column in columns.items()},
                }
            ),
            figures={"unreadable_images": unreadable},
        )

    def _right(self, rows: Sequence[Record], gallery: Sequence[Record]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        place = {record.key: row for row, record in enumerate(gallery)}
        own = [place[record.key] if self.queries is None else -1 for record in rows]
        themselves = [torch.tensor([row] if row >= 0 else [], dtype=torch.int64) for row in own]
        if self.lists is None:
            labels = [torch.tensor([record.label for record in part]) for part in (rows, gallery)]
            return SameLabel(labels[0], labels[1], own), themselves
        relevant: list[Tensor] = []
        ignored: list[Tensor] = []
        for record, row in zip(rows, own, strict=True):
            right, absent = self.lists[record.key]
            relevant.append(_places(right, place, row))
            ignored.append(torch.cat([themselves[len(ignored)], _places(absent, place, row)]))
        return relevant, ignored


def query_columns(positions: PositivePositions, ks: Sequence[int]) -> dict[str, Tensor]:
    """Every metric as one value (Q,) a query."""
    columns = {
        "mean_average_precision": positions.average_precision(),
        "r_precision": positions.r_precision(),
        "ndcg@10": positions.ndcg(10),
        "mar@10": positions.recall(10),
    }
    for k in ks:
        columns |= {f"cmc@{k}": positions.hit(k), f"recall@{k}": positions.recall(k)}
    return columns


def read_relevance(file: str | Path) -> dict[str, RelevanceList]:
    """Lists of right answers: one JSON object a line, `{"query": key, "relevant": [key], "ignored": [key]}`.

    Raises:
        DataError: unreadable, another form, or a query twice.
    """
    lists: dict[str, RelevanceList] = {}
    for number, line in enumerate(read_lines(Path(file)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            query, parts = row["query"], [row["relevant"], row.get("ignored", [])]
            if not isinstance(query, str) or query in lists or not all(_keys(part) for part in parts):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f'{file}, line {number}: {line[:100]!r} is no new {{"query": key, "relevant": [keys]}}.'
            ) from None
        lists[query] = RelevanceList(tuple(parts[0]), tuple(parts[1]))
    if not lists:
        raise DataError(f"{file} is empty; expected one query a line.")
    return lists


def _keys(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(key, str) for key in value)


def _places(keys: Sequence[str], place: Mapping[str, int], own: int) -> Tensor:
    """Rows of readable images; a query is not its own right answer."""
    rows = dict.fromkeys(place[key] for key in keys if key in place and place[key] != own)
    return torch.tensor(list(rows), dtype=torch.int64)
