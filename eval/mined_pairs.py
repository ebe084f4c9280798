"""Mining CLIP-blind pairs: images that one model takes for the same and another does not.

pairs = mine_blind_pairs(clip_features, vision_features, above=0.95, below=0.6)
MinedPairsEvaluator(records, second=open_source("timm:NAME@weights.safetensors")).run(source)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.blind_pairs import BlindPairsEvaluator, PairSet, StatedPair
from eval.features import IMAGES, EmbeddingSource, embed_records, parts_of
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError

# Similarities held at once: 32 MB of float32.
_CELLS = 8_000_000


class MinedPair(NamedTuple):
    """Two images; first < second."""

    first: int
    second: int
    alike: float  # cosine in the model that confuses them
    apart: float  # cosine in the model that does not


def mine_blind_pairs(
    first: Tensor,
    second: Tensor,
    above: float = 0.95,
    below: float = 0.6,
    most: int | None = None,
    progress: Progress | None = None,
) -> list[MinedPair]:
    """Pairs with a cosine above `above` in one space and below `below` in the other, exact, block by block.

    Args:
        first: (N,D) unit norm, of the model whose blindness is sought.
        second: (N,E) unit norm, of a model that sees otherwise.
        above, below: thresholds of the paper for CLIP ViT-L/14 and DINOv2 ViT-L/14; others need their own.
        most: only so many pairs, those furthest apart in the two spaces.
        progress: called with (done, total) images.

    Returns:
        By falling difference of the two cosines.

    Raises:
        ValueError: another number of rows, or features that are not finite.

    Source: Tong et al. 2024, "Eyes Wide Shut?", CVPR, arXiv:2401.06209, section 2.
    Differs: the mining code is not released; every pair is looked at, once.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(f"Features are {tuple(first.shape)} and {tuple(second.shape)}; expected (N,D) and (N,E).")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("Features are not finite.")
    rows = max(1, _CELLS // max(len(first), 1))
    found: list[MinedPair] = []
    for start in range(0, len(first), rows):
        # Later images only: each pair once, and no image with itself.
        alike = first[start : start + rows] @ first[start:].T
        later = torch.arange(alike.shape[1]) > torch.arange(alike.shape[0])[:, None]
        places = ((alike > above) & later).nonzero()
        apart = (second[start + places[:, 0]] * second[start + places[:, 1]]).sum(1)
        chosen = apart < below
        for (row, column), other in zip(places[chosen].tolist(), apart[chosen].tolist(), strict=True):
            found.append(MinedPair(start + row, start + column, alike[row, column].item(), other))
        if progress:
            progress(min(start + rows, len(first)), len(first))
    found.sort(key=lambda pair: (pair.apart - pair.alike, pair.first, pair.second))
    return found if most is None else found[:most]


def pair_thresholds(first: Tensor, second: Tensor, share: float) -> tuple[float, float]:
    """Thresholds for models of other scales: the `share` most alike pairs in one, the half least alike in the other.

    Args:
        first, second: as for `mine_blind_pairs`.
        share: of all pairs, 0 to 1.

    Raises:
        ConfigError: fewer than two images, or a share outside (0,1).
    """
    if len(first) < 2 or not 0 < share < 1:
        raise ConfigError(f"{len(first)} images and a share of {share}: expected 2 images and a share within (0,1).")
    # Some thousand images tell a quantile well enough, and their pairs fit into memory.
    rows = torch.linspace(0, len(first) - 1, min(len(first), 2000)).long()
    upper = torch.triu_indices(len(rows), len(rows), 1)
    one, two = ((f[rows] @ f[rows].T)[upper[0], upper[1]] for f in (first, second))
    kept = max(1, round(share * len(one)))
    return one.topk(kept).values[-1].item(), two.median().item()


def statements_of_captions(records: Sequence[Record], pairs: Sequence[MinedPair]) -> PairSet:
    """A substitute for written statements: each image of a mined pair with the first caption that it alone has.

    Raises:
        DataError: no pair has captions of its own.
    """
    found = list(_stated(records, pairs))
    if not found:
        raise DataError(f"None of {len(pairs)} mined pairs has a caption for each image; give images with captions.")
    left = ("mined_pairs_without_captions", len(pairs) - len(found))
    return PairSet(tuple(found), "substitute: mined pairs with a caption of each image", (left,))


def _stated(records: Sequence[Record], pairs: Sequence[MinedPair]) -> Iterator[StatedPair]:
    for pair in pairs:
        first, second = records[pair.first], records[pair.second]
        own = [caption for caption in first.captions if caption not in second.captions]
        others = [caption for caption in second.captions if caption not in first.captions]
        if own and others:
            yield StatedPair(f"{first.key}+{second.key}", (first, second), (own[0], others[0]))


@dataclass(frozen=True)
class MinedPairsEvaluator(Evaluator):
    """Mine pairs among images, and score those that have captions of their own.

    Attributes:
        records: images, with captions where they are to be scored.
        second: the model that sees otherwise; images are enough for it.
        above, below: the paper's thresholds; ignored with `share`.
        share: chooses both thresholds by `pair_thresholds`; None keeps those given.
        most: the most pairs.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) images.
    """

    records: Sequence[Record]
    second: EmbeddingSource
    above: float = 0.95
    below: float = 0.6
    share: float | None = None
    most: int | None = None
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed with both, mine, score.

        Args:
            source: the model whose blindness is sought.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `mined_share` of all pairs, and where captions allow those of `BlindPairsEvaluator`; `per_item` one
            row a mined pair.

        Raises:
            DataError: fewer than two readable images.
            GalleryError: features that are not finite.
        """
        of_first, of_second = parts_of(self.progress, len(self.records), len(self.records))
        first = embed_records(source, self.records, self.batch_size, self.workers, of_first)
        second = embed_records(self.second, first.records, self.batch_size, self.workers, of_second)
        if len(second.records) < 2:
            raise DataError("Fewer than two images could be read; there is no pair.")
        row = {record.key: place for place, record in enumerate(first.records)}
        features = first.features[[row[record.key] for record in second.records]]
        above, below = self.above, self.below
        if self.share is not None:
            above, below = pair_thresholds(features, second.features, self.share)
        pairs = mine_blind_pairs(features, second.features, above, below, self.most)
        num_pairs = len(features) * (len(features) - 1) // 2
        mined = Evaluation(
            metrics={"mined_share": len(pairs) / num_pairs},
            intervals={},
            protocol={
                "images": IMAGES,
                "above": round(above, 6),
                "below": round(below, 6),
                "thresholds": "given" if self.share is None else f"most alike {self.share:g}, and the median",
                "second_model": str(getattr(self.second, "name", "")),
            },
            counts={
                "images": len(features),
                "mined_pairs": len(pairs),
                "unreadable_images": len(first.unreadable) + len(second.unreadable),
            },
            per_item=_table(second.records, pairs),
            figures={"unreadable_images": first.unreadable + second.unreadable},
        )
        if not pairs or not any(record.captions for record in second.records):
            return mined
        stated = statements_of_captions(second.records, pairs)
        scored = BlindPairsEvaluator(stated, "{}", self.batch_size, self.workers, self.seed).run(source)
        return replace(
            mined,
            metrics={**mined.metrics, **scored.metrics},
            intervals=scored.intervals,
            protocol={**scored.protocol, **mined.protocol},
            counts={**mined.counts, "pairs": scored.counts["pairs"], **dict(stated.left_out)},
        )


def _table(records: Sequence[Record], pairs: Sequence[MinedPair]) -> pa.Table:
    return pa.table(
        {
            "first": [records[pair.first].key for pair in pairs],
            "second": [records[pair.second].key for pair in pairs],
            "alike": [pair.alike for pair in pairs],
            "apart": [pair.apart for pair in pairs],
        }
    )
