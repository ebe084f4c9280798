"""Referring expressions: which of an image's boxes a text means.

ReferringEvaluator(unique_objects(scenes)).run(source).metrics["accuracy"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import pyarrow as pa
import torch
from PIL import Image

from eval.coco_instances import Box
from eval.crops import Crop, Cutter, embed_crops, plain_cut
from eval.features import IMAGES, embed_texts, parts_of
from eval.metrics import bootstrap_interval, hit_probability, label_ranks
from vlkit.addons.inputs.red_circle import VIEWS, RedCircle
from vlkit.addons.inputs.red_circle import View as MarkedView
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.decode import image_to_tensor
from vlkit.data.records import Record
from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource

View = Literal["crop"] | MarkedView
_VIEWS: tuple[View, ...] = ("crop", *VIEWS)


class Expression(NamedTuple):
    """A text that means one of an image's boxes."""

    key: str
    image: Record
    text: str
    boxes: tuple[Box, ...]
    target: int  # row of `boxes`


@dataclass(frozen=True)
class ReferringEvaluator(Evaluator):
    """The share of expressions whose own box scores highest among the image's boxes.

    Attributes:
        expressions: at least two boxes each.
        views: how a box is shown to the model; scores are summed over views. "crop": the box alone; the others are
            `vlkit.addons.inputs.red_circle`'s: the whole image with an ellipse in the box, drawn in red, grey or
            blurred outside.
        template: of an expression.
        num_others: captions of the same set, drawn by the seed, whose mean score is subtracted from each box; 0 leaves
            scores as they are. It makes the evaluation transductive in the texts.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the draw and the bootstrap.
        progress: called with (done, total) views.
    """

    expressions: Sequence[Expression]
    views: tuple[View, ...] = ("crop",)
    template: str = "a photo of {}"
    num_others: int = 0
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: an unknown view, or a template without one `{}`.
            DataError: no expression, or one without two boxes.
        """
        unknown = [view for view in self.views if view not in _VIEWS]
        if unknown or not self.views or self.template.count("{}") != 1:
            raise ConfigError(
                f"views {', '.join(self.views)}, template {self.template!r}: expected views among {', '.join(_VIEWS)} "
                "and a template with one {}."
            )
        if not self.expressions:
            raise DataError("There is no expression.")
        for one in self.expressions:
            if len(one.boxes) < 2 or not 0 <= one.target < len(one.boxes):
                raise DataError(f"Expression {one.key!r} has {len(one.boxes)} boxes, target {one.target}; expected 2.")

    def run(self, source: FeatureSource, pipeline: None = None) -> Evaluation:
        """Show boxes, score, choose.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `accuracy` (boxes that tie share the hit), `chance`; `per_item` one row an expression.

        Raises:
            DataError: no readable image.
            GalleryError: features that are not finite.

        Source: Shtedritski et al. 2023, "What does CLIP know about a red circle?", arXiv:2304.06712, whose protocol
        this is; 500 other captions are subtracted in FGVP's re-implementation.
        Differs: as `vlkit.addons.inputs.red_circle`; texts that are subtracted are drawn by the seed.
        """
        crops = [Crop(one.image, box) for one in self.expressions for box in one.boxes]
        texts = [self.template.replace("{}", one.text) for one in self.expressions]
        reports = parts_of(self.progress, *[len({crop.key for crop in crops})] * len(self.views))
        seen = [
            embed_crops(source, crops, self.batch_size, self.workers, report, self._cutter(view, source))
            for view, report in zip(self.views, reports, strict=True)
        ]
        text = embed_texts(source, texts)
        generator = torch.Generator().manual_seed(self.seed)
        others = torch.randperm(len(texts), generator=generator)[: self.num_others]
        mean = text[others].mean(0) if len(others) else torch.zeros(text.shape[1])
        rows = [n for n, one in enumerate(self.expressions) if self._there(one, seen[0].rows)]
        if not rows:
            raise DataError("No expression has all of its boxes.")
        hits, chosen = [], []
        for n in rows:
            one = self.expressions[n]
            keys = [Crop(one.image, box).key for box in one.boxes]
            # The mean score of other captions is the score of their mean.
            scores = torch.stack([part.features[[part.rows[key] for key in keys]] for part in seen]).sum(0)
            line = (scores @ (text[n] - mean))[None]
            hits.append(hit_probability(label_ranks(line, torch.tensor([one.target])), 1))
            chosen.append(int(line.argmax()))
        hit, expressions = torch.cat(hits), [self.expressions[n] for n in rows]
        chance = torch.tensor([1 / len(one.boxes) for one in expressions], dtype=torch.float64)
        low, high = bootstrap_interval(hit[:, None], seed=self.seed)
        unreadable = tuple(dict(pair for part in seen for pair in part.unreadable).items())
        return Evaluation(
            metrics={"accuracy": hit.mean().item(), "chance": chance.mean().item()},
            intervals={"accuracy": (low[0].item(), high[0].item())},
            protocol={
                "images": IMAGES,
                "views": list(self.views),
                "template": self.template,
                "subtracted": f"mean over {len(others)} texts of the set" if len(others) else "nothing",
                "boxes": "the image's annotated ones",
                "interval": f"95%, percentile bootstrap, 1000 resamples of expressions, seed {self.seed}",
            },
            counts={
                "expressions": len(expressions),
                "images": len({one.image.key for one in expressions}),
                "boxes": len(seen[0].rows),
                "unreadable_images": len(unreadable),
                "expressions_of_unreadable_images": len(self.expressions) - len(rows),
            },
            per_item=pa.table(
                {
                    "key": [one.key for one in expressions],
                    "text": [one.text for one in expressions],
                    "boxes": [len(one.boxes) for one in expressions],
                    "target": [one.target for one in expressions],
                    "chosen": chosen,
                    "hit": hit.numpy(),
                }
            ),
            figures={"unreadable_images": unreadable},
        )

    def _cutter(self, view: View, source: FeatureSource) -> Cutter:
        return plain_cut if view == "crop" else drawn(view, source.embedder.encoder.preprocess)

    def _there(self, one: Expression, rows: dict[str, int]) -> bool:
        return all(Crop(one.image, box).key in rows for box in one.boxes)


def drawn(view: MarkedView, preprocess: Preprocess) -> Cutter:
    """The whole image squeezed into the model's square, a box marked in it."""
    square = replace(preprocess, resize_mode="squash", crop_pct=1.0)

    def cut(image: Image.Image, box: Box) -> Image.Image:
        # Annotated boxes reach over the edge by fractions of a pixel.
        top, left = max(0.0, box.top) / image.height, max(0.0, box.left) / image.width
        height, width = min(box.height / image.height, 1 - top), min(box.width / image.width, 1 - left)
        mark = RedCircle(top=top, left=left, height=height, width=width, view=view)
        pixels = mark.edit_image(square(image_to_tensor(image))[None].float() / 255)[0]
        return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())

    return cut
