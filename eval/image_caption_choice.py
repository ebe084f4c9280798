"""Image-caption choice: which caption belongs to an image, which image to a caption (Winoground, SugarCrepe).

instances = read_sugarcrepe("add_obj.json", images="val2017")
ImageCaptionChoiceEvaluator(instances).run(embedder).metrics["text_accuracy"]
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, embed_pairs
from eval.metrics import bootstrap_interval
from eval.metrics.ranking import TIE_TOLERANCE
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import DataError

# Orders of tied scores that are gone through one by one; larger instances are drawn from.
_MOST_CELLS = 4


class ChoiceInstance(NamedTuple):
    """Images and captions that are easily confused; caption i < images belongs to image i, further ones to none."""

    key: str
    images: tuple[Record, ...]
    captions: tuple[str, ...]
    tag: str = ""  # results are also given for each tag


class ChoiceHits(NamedTuple):
    """Of one instance, each in [0,1]."""

    text: float  # every image scores its own caption above all others
    image: float  # every caption scores its own image above all others
    group: float  # both


@dataclass(frozen=True)
class ImageCaptionChoiceEvaluator(Evaluator):
    """Winoground's three scores; with one image an instance, as in SugarCrepe, only the text score means anything.

    Attributes:
        instances: what to choose from.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) over images and texts.
    """

    instances: Sequence[ChoiceInstance]
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no instance, or one without two captions or with fewer captions than images.
        """
        if not self.instances:
            raise DataError("There is no instance to choose in.")
        for one in self.instances:
            if not one.images or len(one.captions) < max(2, len(one.images)):
                raise DataError(
                    f"Instance {one.key!r} has {len(one.images)} images and {len(one.captions)} captions; expected at "
                    "least one image, at least two captions, and a caption for each image."
                )

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, compare.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics `text_accuracy`, and where instances have several images `image_accuracy` and `group_accuracy`;
            the same behind `{tag}/`; `per_item` one row an instance.

        Raises:
            DataError: no readable image.
            GalleryError: features that are not finite.

        Source: Thrush et al. 2022 (Winoground), arXiv:2204.03162, equations 1 to 3; Hsieh et al. 2023 (SugarCrepe),
        arXiv:2306.14610; CLIP_benchmark 1.6.1, metrics/image_caption_selection.py.
        """
        records = (image for one in self.instances for image in one.images)
        texts = (text for one in self.instances for text in one.captions)
        known = embed_pairs(source, records, texts, self.batch_size, self.workers, self.progress)
        images = known.images
        kept = [one for one in self.instances if all(image.key in known.image_row for image in one.images)]
        if not kept:
            raise DataError("No instance has all of its images.")
        hits = torch.tensor(
            [
                choice_hits(
                    images.features[[known.image_row[image.key] for image in one.images]]
                    @ known.texts[[known.text_row[caption] for caption in one.captions]].T
                )
                for one in kept
            ],
            dtype=torch.float64,
        )
        several = any(len(one.images) > 1 for one in kept)
        columns = {"text_accuracy": 0, "image_accuracy": 1, "group_accuracy": 2} if several else {"text_accuracy": 0}
        low, high = bootstrap_interval(hits, seed=self.seed)
        metrics = {key: hits[:, column].mean().item() for key, column in columns.items()}
        for tag in sorted({one.tag for one in kept} - {""}):
            rows = torch.tensor([one.tag == tag for one in kept])
            metrics |= {f"{tag}/{key}": hits[rows, column].mean().item() for key, column in columns.items()}
        return Evaluation(
            metrics=metrics,
            intervals={key: (low[column].item(), high[column].item()) for key, column in columns.items()},
            protocol={
                "images": IMAGES,
                "similarity": "cosine",
                "ties": "within 1e-6; the expectation over their random order",
                "interval": f"95%, percentile bootstrap, 1000 resamples of instances, seed {self.seed}",
            },
            counts={
                "instances": len(kept),
                "images": len(images.records),
                "texts": len(known.texts),
                "unreadable_images": len(images.unreadable),
                "instances_of_unreadable_images": len(self.instances) - len(kept),
            },
            per_item=pa.table(
                {
                    "key": [one.key for one in kept],
                    "tag": [one.tag for one in kept],
                    **{key.replace("accuracy", "hit"): hits[:, column].numpy() for key, column in columns.items()},
                }
            ),
            figures={"unreadable_images": images.unreadable},
        )


def choice_hits(scores: Tensor) -> ChoiceHits:
    """Whether an instance's scores (i,c) put every caption and every image in its place.

    Scores within 1e-6 of one another stand in random order, and the result is the expectation over it: an instance
    of two images and two captions with equal scores gives 1/4, 1/4 and 1/6, which is chance.
    """
    num_images, num_captions = scores.shape
    values = scores.double()
    ordered = values.flatten().sort().values
    if num_images * num_captions < 2 or (ordered.diff() > TIE_TOLERANCE).all():
        return _strict(values)
    # Scores that tie become equal, then every order of all cells decides once.
    level = torch.cat([ordered.new_zeros(1), (ordered.diff() > TIE_TOLERANCE).cumsum(0).double()])
    levels = torch.empty_like(ordered).scatter_(0, values.flatten().argsort(), level)
    cells = num_images * num_captions
    if cells <= _MOST_CELLS:
        orders = torch.tensor(list(itertools.permutations(range(cells))))
    else:
        generator = torch.Generator().manual_seed(0)
        orders = torch.rand(200, cells, generator=generator).argsort(1)
    found = [_strict((levels + order / cells).view_as(values)) for order in orders]
    return ChoiceHits(*(sum(column) / len(found) for column in zip(*found, strict=True)))


def _strict(scores: Tensor) -> ChoiceHits:
    own = torch.arange(len(scores))
    text = bool((scores.argmax(1) == own).all())
    image = bool((scores[:, : len(scores)].argmax(0) == own).all())
    return ChoiceHits(float(text), float(image), float(text and image))
