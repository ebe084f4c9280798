"""Caption judgement: do CLIPScore and RefCLIPScore order captions as people do?

sets = read_flickr8k_judgements("flickr8k")
CaptionJudgementEvaluator(sets).run(embedder).metrics["expert/clip_score/tau_c"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.features import IMAGES, EmbeddedPairs, EmbeddingSource, embed_pairs
from eval.metrics import kendall_tau
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.data.sources import read_source
from vlkit.data.sources.annotated import read_lines
from vlkit.errors import DataError

PREFIX = "A photo depicts "
WEIGHT = 2.5
EXPERT_FILE, CROWD_FILE = "ExpertAnnotations.txt", "CrowdFlowerAnnotations.txt"
_RESAMPLES = 200


class Judgement(NamedTuple):
    """One rating of one caption of one image."""

    key: str  # of the image's record
    caption: str
    rating: float
    references: tuple[str, ...]


@dataclass(frozen=True)
class JudgedSet:
    """Ratings of one kind with their images.

    Attributes:
        name: of the set, e.g. "expert".
        variant: Kendall's "b" or "c", as published for this set.
        records: the images, by key.
        judgements: the ratings.
        how: conventions, for the record.
        skipped: pairs left out, by reason.
    """

    name: str
    variant: Literal["b", "c"]
    records: tuple[Record, ...]
    judgements: tuple[Judgement, ...]
    how: str
    skipped: tuple[tuple[str, int], ...] = ()


def clip_score(image: Tensor, candidate: Tensor) -> Tensor:
    """CLIPScore of pairs: 2.5 x max(cosine, 0).

    Args:
        image: (n,D) unit norm.
        candidate: (n,D) unit norm features of `A photo depicts {caption}`.

    Returns:
        (n,) float64.

    Source: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
    arXiv:2104.08718, section 3.
    """
    return WEIGHT * (image.double() * candidate.double()).sum(1).clamp(min=0)


def ref_clip_score(image: Tensor, candidate: Tensor, references: Sequence[Tensor]) -> Tensor:
    """RefCLIPScore: the harmonic mean of CLIPScore and the largest cosine with a reference, cut at 0.

    Args:
        image: (n,D) unit norm.
        candidate: (n,D) unit norm.
        references: of each pair (r,D) unit norm, r at least 1; with the same prefix as the candidate.

    Returns:
        (n,) float64; 0 where both are 0.

    Source: Hessel et al. 2021, arXiv:2104.08718, section 3.
    Differs: the authors' code leaves the reference similarity uncut; it is never negative on their data.
    """
    score = clip_score(image, candidate)
    rows = zip(candidate, references, strict=True)
    best = torch.stack([(of.double() @ one.double()).max().clamp(min=0) for one, of in rows])
    return 2 * score * best / (score + best).clamp(min=1e-300)


@dataclass(frozen=True)
class CaptionJudgementEvaluator(Evaluator):
    """Kendall's tau between caption scores and human ratings.

    Attributes:
        sets: ratings; each is measured by itself.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) over images and texts.
    """

    sets: Sequence[JudgedSet]
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed every image and every text once, score the rated pairs, correlate.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics `{set}/clip_score/tau_{b|c}` and `{set}/ref_clip_score/tau_{b|c}`; one row a rating in `per_item`.
            Scores that are all equal, as those of an untrained model whose cosines are negative, have no tau: it is
            left out, and the count `{set}_{score}_without_order` says so.

        Raises:
            DataError: no rated image could be read, or people gave all captions of a set the same rating.
            GalleryError: features that are not finite.
        """
        records = (record for one in self.sets for record in one.records)
        texts = (text for one in self.sets for item in one.judgements for text in (item.caption, *item.references))
        known = embed_pairs(source, records, texts, self.batch_size, self.workers, self.progress, PREFIX)
        images = known.images
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        counts = {"images": len(images.records), "texts": len(known.texts), "unreadable_images": len(images.unreadable)}
        tables = []
        for one in self.sets:
            rated = [item for item in one.judgements if item.key in known.image_row]
            pairs = _score(rated, known)
            ratings = np.array([item.rating for item in rated])
            units = np.unique([known.image_row[item.key] for item in rated], return_inverse=True)[1]
            if len(np.unique(ratings)) < 2:
                raise DataError(f"All {len(rated)} ratings of set {one.name} are equal; there is no order to compare.")
            for name, scores in pairs.items():
                if len(np.unique(scores)) < 2:
                    counts[f"{one.name}_{name}_without_order"] = len(rated)
                    continue
                key = f"{one.name}/{name}/tau_{one.variant}"
                metrics[key] = kendall_tau(scores, ratings, one.variant)
                intervals[key] = _interval(scores, ratings, units, one.variant, self.seed)
            counts[f"{one.name}_judgements"] = len(rated)
            counts |= {f"{one.name}_{reason}": count for reason, count in one.skipped}
            tables.append(_table(one.name, rated, pairs, ratings))
        return Evaluation(
            metrics=metrics,
            intervals=intervals,
            protocol={
                "images": IMAGES,
                "prefix": PREFIX,
                "clip_score": f"{WEIGHT} x max(cosine, 0)",
                "ref_clip_score": "harmonic mean with the largest reference cosine, cut at 0",
                "sets": {one.name: one.how for one in self.sets},
                "interval": f"95%, percentile bootstrap, {_RESAMPLES} resamples of images, seed {self.seed}",
            },
            counts=counts,
            per_item=pa.concat_tables(tables),
            figures={"unreadable_images": images.unreadable},
        )


def read_flickr8k_judgements(folder: str | Path, images: str | Path | None = None) -> list[JudgedSet]:
    """Flickr8k-Expert and Flickr8k-CF in their published form, with the conventions of CLIPScore's code.

    Expert: each of the three ratings 1-4 counts by itself, and pairs whose caption is a reference of its image are
    left out, as SPICE does. CF: the share of yes; a judged caption is no reference of its image.

    Args:
        folder: holds `Flickr8k.token.txt`, the images, and one of the two annotation files or both.
        images: folder of the images where it is not the customary one.

    Raises:
        DataError: neither annotation file, or a row that is no judgement.

    Source: Hessel et al. 2021, arXiv:2104.08718, appendix A, and jmhessel/clipscore, flickr8k_example.
    """
    place = Path(folder)
    present = [name for name in (EXPERT_FILE, CROWD_FILE) if (place / name).is_file()]
    if not present:
        raise DataError(f"{place} holds neither {EXPERT_FILE} nor {CROWD_FILE}; expected Flickr8k's text folder.")
    source = read_source(place, format="flickr8k", images=images)
    record_of = {record.key: record for record in source.records}
    caption_of = _captions(place / "Flickr8k.token.txt")
    captions: dict[str, list[str]] = {}
    for name, text in caption_of.items():
        captions.setdefault(name.partition("#")[0], []).append(text)
    readers = {EXPERT_FILE: _read_expert, CROWD_FILE: _read_crowd}
    return [readers[name](place / name, record_of, caption_of, captions) for name in present]


def _captions(file: Path) -> dict[str, str]:
    rows = [line.strip().partition("\t") for line in read_lines(file) if line.strip()]
    return {name: text for name, _, text in rows}


def _read_expert(
    file: Path, record_of: dict[str, Record], caption_of: dict[str, str], captions: dict[str, list[str]]
) -> JudgedSet:
    found: list[Judgement] = []
    skipped = {"pairs_with_a_reference": 0, "pairs_without_image": 0}
    for key, caption, ratings in _rows(file, caption_of):
        if caption in captions.get(key, ()):
            skipped["pairs_with_a_reference"] += 1
        elif key not in record_of:
            skipped["pairs_without_image"] += 1
        else:
            references = tuple(_folded(text) for text in captions[key])
            found += [Judgement(key, _folded(caption), rating, references) for rating in ratings]
    how = "three expert ratings 1-4, each by itself; pairs whose caption is a reference left out"
    return _judged("expert", "c", record_of, found, how, skipped)


def _read_crowd(
    file: Path, record_of: dict[str, Record], caption_of: dict[str, str], captions: dict[str, list[str]]
) -> JudgedSet:
    rows = list(_rows(file, caption_of))
    judged: dict[str, set[str]] = {}
    for key, caption, _ in rows:
        judged.setdefault(key, set()).add(caption)
    missing = sum(key not in record_of for key, _, _ in rows)
    references = {key: tuple(_folded(t) for t in captions[key] if t not in judged[key]) for key in judged}
    found = [
        Judgement(key, _folded(caption), ratings[0], references[key])
        for key, caption, ratings in rows
        if key in record_of
    ]
    how = "share of yes of at least three people; captions judged with an image are not its references"
    return _judged("crowdflower", "b", record_of, found, how, {"pairs_without_image": missing})


def _judged(
    name: str,
    variant: Literal["b", "c"],
    record_of: dict[str, Record],
    found: list[Judgement],
    how: str,
    skipped: dict[str, int],
) -> JudgedSet:
    keys = dict.fromkeys(item.key for item in found)
    if not keys:
        raise DataError(f"None of the {name} judgements has its image here; name their folder with --images.")
    return JudgedSet(name, variant, tuple(record_of[key] for key in keys), tuple(found), how, tuple(skipped.items()))


def _rows(file: Path, caption_of: dict[str, str]) -> list[tuple[str, str, tuple[float, ...]]]:
    """Image name, caption as in the token file, and the numbers of each line."""
    rows = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        cells = line.strip().split("\t")
        try:
            rows.append((cells[0], caption_of[cells[1]], tuple(float(cell) for cell in cells[2:5])))
            if len(cells) != 5:
                raise ValueError
        except (ValueError, KeyError, IndexError):
            raise DataError(
                f"{file}, line {number}: {line[:120]!r} is not `image<TAB>caption id<TAB>three numbers` with a caption "
                "of Flickr8k.token.txt."
            ) from None
    return rows


def _folded(text: str) -> str:
    return " ".join(text.split())


def _score(rated: Sequence[Judgement], known: EmbeddedPairs) -> dict[str, NDArray[np.float64]]:
    image = known.images.features[[known.image_row[item.key] for item in rated]]
    candidate = known.texts[[known.text_row[item.caption] for item in rated]]
    scores = {"clip_score": clip_score(image, candidate).numpy()}
    if all(item.references for item in rated):
        references = [known.texts[[known.text_row[text] for text in item.references]] for item in rated]
        scores["ref_clip_score"] = ref_clip_score(image, candidate, references).numpy()
    return scores


def _table(
    name: str, rated: Sequence[Judgement], scores: dict[str, NDArray[np.float64]], ratings: NDArray[np.float64]
) -> pa.Table:
    missing = np.full(len(rated), np.nan)
    return pa.table(
        {
            "set": [name] * len(rated),
            "key": [item.key for item in rated],
            "caption": [item.caption for item in rated],
            "rating": ratings,
            "clip_score": scores["clip_score"],
            "ref_clip_score": scores.get("ref_clip_score", missing),
        }
    )


def _interval(
    scores: NDArray[np.float64],
    ratings: NDArray[np.float64],
    units: NDArray[np.int64],
    variant: Literal["b", "c"],
    seed: int,
) -> tuple[float, float]:
    """Over resampled images, each with all its ratings."""
    generator = np.random.Generator(np.random.Philox(seed))
    order = np.argsort(units, kind="stable")
    rows_of = np.split(order, np.flatnonzero(np.diff(units[order])) + 1)
    values = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([rows_of[unit] for unit in generator.integers(0, len(rows_of), len(rows_of))])
        if len(np.unique(ratings[rows])) > 1 and len(np.unique(scores[rows])) > 1:
            values.append(kendall_tau(scores[rows], ratings[rows], variant))
    low, high = np.quantile(values, [0.025, 0.975]).tolist() if values else (float("-1"), 1.0)
    return low, high
