"""CLIP-blind pairs: two images a model confuses, and a statement true of each; MMVP's score.

BlindPairsEvaluator(read_mmvp("MMVP_VLM")).run(source).metrics["pair_accuracy"]
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, embed_records, embed_texts, parts_of
from eval.metrics import bootstrap_interval
from eval.metrics.ranking import TIE_TOLERANCE
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources.annotated import read_text
from vlkit.errors import ConfigError, DataError

IMAGE_FOLDER, TABLE = "MLLM_VLM Images", "Questions.csv"
_PROMPT = "a photo of {}"


class StatedPair(NamedTuple):
    """Two images and a statement true of each."""

    key: str
    images: tuple[Record, Record]
    statements: tuple[str, str]
    pattern: str = ""


class PairSet(NamedTuple):
    """Pairs to score, and what was left out."""

    pairs: tuple[StatedPair, ...]
    how: str
    left_out: tuple[tuple[str, int], ...] = ()


def read_mmvp(folder: str | Path) -> PairSet:
    """MMVP-VLM: `Questions.csv` (`Question ID,Type,Statement`, two rows a pair) and `MLLM_VLM Images/TYPE/ID.jpg`.

    Raises:
        DataError: another form, an odd number of rows, two types in a pair, or no image found.

    Differs: the pattern is the file's own column; the released script takes it from the row's number.
    """
    place = Path(folder)
    file = place / TABLE
    rows = [row for row in csv.reader(read_text(file).splitlines()) if row][1:]
    if not rows or len(rows) % 2 or any(len(row) < 3 for row in rows):
        raise DataError(
            f"{file}: {len(rows)} rows behind the header; expected two `Question ID,Type,Statement` a pair."
        )
    pairs, missing = [], 0
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        if one[1] != two[1]:
            raise DataError(f"{file}: questions {one[0]} and {two[0]} are a pair, but of types {one[1]!r}, {two[1]!r}.")
        images = [_image(place / IMAGE_FOLDER / row[1].strip(), row[0].strip()) for row in (one, two)]
        if images[0] is None or images[1] is None:
            missing += 1
            continue
        statements = (one[2].strip(), two[2].strip())
        pairs.append(StatedPair(f"{one[0]}+{two[0]}", (images[0], images[1]), statements, one[1].strip()))
    if not pairs:
        raise DataError(f"None of the images of {file} was found in {place / IMAGE_FOLDER}.")
    return PairSet(tuple(pairs), "MMVP-VLM", (("pairs_without_image", missing),))


@dataclass(frozen=True)
class BlindPairsEvaluator(Evaluator):
    """Pairs of which both statements pick their own image; chance is 1/4.

    Attributes:
        data: the pairs.
        template: of a statement.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) over images and texts.
    """

    data: PairSet
    template: str = _PROMPT
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no pair.
            ConfigError: a template without one `{}`.
        """
        if not self.data.pairs:
            raise DataError("There is no pair of images to score.")
        if self.template.count("{}") != 1:
            raise ConfigError(f"Template {self.template!r} needs exactly one {{}} for the statement.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, compare.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `pair_accuracy`, the same for each pattern behind `{pattern}/`, and their mean
            `patterns/pair_accuracy`; `statement_accuracy`.

        Raises:
            DataError: no readable image.
            GalleryError: features that are not finite.

        Source: Tong et al. 2024, arXiv:2401.06209; code MMVP, scripts/evaluate_vlm.py.
        """
        records = list({image.key: image for pair in self.data.pairs for image in pair.images}.values())
        texts = [self.template.replace("{}", text) for pair in self.data.pairs for text in pair.statements]
        of_images, of_texts = parts_of(self.progress, len(records), len(texts))
        images = embed_records(source, records, self.batch_size, self.workers, of_images)
        text = embed_texts(source, texts, of_texts)
        row = {record.key: place for place, record in enumerate(images.records)}
        kept = [n for n, pair in enumerate(self.data.pairs) if all(image.key in row for image in pair.images)]
        if not kept:
            raise DataError("No pair has both of its images.")
        pairs = [self.data.pairs[n] for n in kept]
        seen = images.features[torch.tensor([[row[image.key] for image in pair.images] for pair in pairs])]
        said = text.unflatten(0, (-1, 2))[kept]
        right = own_image_wins(said @ seen.transpose(1, 2))
        both = right.all(1).double()
        low, high = bootstrap_interval(both[:, None], seed=self.seed)
        patterns = {
            f"{pattern}/pair_accuracy": both[torch.tensor([pair.pattern == pattern for pair in pairs])].mean().item()
            for pattern in sorted({pair.pattern for pair in pairs} - {""})
        }
        metrics = {"pair_accuracy": both.mean().item(), "statement_accuracy": right.double().mean().item(), **patterns}
        if patterns:
            metrics["patterns/pair_accuracy"] = sum(patterns.values()) / len(patterns)
        return Evaluation(
            metrics=metrics,
            intervals={"pair_accuracy": (low[0].item(), high[0].item())},
            protocol={
                "images": IMAGES,
                "pairs": self.data.how,
                "template": self.template,
                "right": "both statements score their own image strictly higher; within 1e-6 is wrong",
                "interval": f"95%, percentile bootstrap, 1000 resamples of pairs, seed {self.seed}",
            },
            counts={
                "pairs": len(pairs),
                "images": len(images.records),
                "unreadable_images": len(images.unreadable),
                "pairs_of_unreadable_images": len(self.data.pairs) - len(pairs),
                **dict(self.data.left_out),
            },
            per_item=pa.table(
                {
                    "key": [pair.key for pair in pairs],
                    "pattern": [pair.pattern for pair in pairs],
                    "first_right": right[:, 0].numpy(),
                    "second_right": right[:, 1].numpy(),
                    "hit": both.numpy(),
                }
            ),
            figures={"unreadable_images": images.unreadable},
        )


def own_image_wins(scores: Tensor) -> Tensor:
    """(n,2) bool: whether statement i scores image i strictly above the other; `scores` (n,2,2), rows statements."""
    own = scores.diagonal(dim1=1, dim2=2)
    other = scores.flip(2).diagonal(dim1=1, dim2=2)
    return own > other + TIE_TOLERANCE


def _image(folder: Path, number: str) -> Record | None:
    paths = [folder / f"{number}{suffix}" for suffix in (".jpg", ".png")]
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else Record(f"{folder.name}/{number}", ImageRef(path=str(path)))
