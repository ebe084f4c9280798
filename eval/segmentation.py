"""Zero-shot segmentation: every pixel gets the class its patches are most similar to; mIoU against masks.

SegmentationEvaluator(read_instances("coco_small")).run(source).metrics["mean_iou"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.coco_instances import Scene, Scenes
from eval.metrics import confusion_matrix
from eval.segmentation_pictures import write_segmentation
from vlkit.addons.class_names import ClassName, parse_class
from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.passes import editing
from vlkit.addons.patch_scores import Window, denoised, enlarged, patch_scores, window_of, window_scores
from vlkit.addons.pipeline import Pipeline
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.images import read_image
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource
from vlkit.models.dual_encoder import DualEncoder

Background = Literal["ignored", "class"]

# What lies behind things: the stuff that published name lists of COCO-Object give to the background.
BACKGROUND_WORDS = (
    "background", "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sand", "desk",
    "building", "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill",
    "rail", "fence",
)  # fmt: skip
_RESAMPLES = 1000


class _Counts(NamedTuple):
    """Of one photograph and every class: pixels of it, given to it, and both."""

    true: Tensor
    given: Tensor
    hits: Tensor


@dataclass(frozen=True)
class SegmentationEvaluator(Evaluator):
    """mIoU of class names on photographs with masks.

    Attributes:
        scenes: photographs, objects and category names.
        class_names: (C,) one a category in its order, `name | synonym`; None takes the categories' own.
        templates: a set's name, a file or a text with `{}`.
        background: "ignored": pixels without an object do not count; "class": they are a class of their own, found
            by `BACKGROUND_WORDS` and, where `threshold` is above 0, wherever no class is more probable than it.
        threshold: see `background`.
        logit_scale: of the softmax over names; None takes the model's own.
        denoise: names nowhere more probable than this are left out of a photograph (MaskCLIP); 0 keeps all.
        short_side, stride: of the window, in pixels; None is 1.5 and 0.5 times the model's size.
        pictures: folder for a sheet of each of the first `num_pictures` photographs.
        num_pictures: how many.
        seed: of the bootstrap.
        progress: called with (done, total) photographs.
    """

    scenes: Scenes
    class_names: Sequence[str] | None = None
    templates: str = "imagenet80"
    background: Background = "ignored"
    threshold: float = 0.0
    logit_scale: float | None = None
    denoise: float = 0.0
    short_side: int | None = None
    stride: int | None = None
    pictures: Path | None = None
    num_pictures: int = 12
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: another number of names than of categories, or thresholds that are no probabilities.
        """
        if self.class_names is not None and len(self.class_names) != len(self.scenes.names):
            raise ConfigError(
                f"{len(self.class_names)} class names for {len(self.scenes.names)} categories; expected one for each, "
                "in the order of the file."
            )
        if not (0 <= self.threshold < 1 and 0 <= self.denoise < 1):
            raise ConfigError(f"threshold {self.threshold}, denoise {self.denoise}: expected probabilities below 1.")
        if self.threshold and self.background == "ignored":
            raise ConfigError("A threshold has no effect while the background is ignored. Leave it out.")

    def run(self, source: FeatureSource, pipeline: Pipeline | None = None) -> Evaluation:
        """Score pixels, count.

        Args:
            source: a model with patches in the joint space.
            pipeline: fitted; edits of the towers change the patches, nothing else is used.

        Returns:
            Metrics `mean_iou` (over classes in truth or prediction), `pixel_accuracy`, `mean_accuracy` (over classes
            in the truth); `per_item` one row a class.

        Raises:
            ConfigError: an add-on that is no edit, a window that does not fit.
            DataError: no readable photograph.
            ModelError: no patches in the joint space.
        """
        edits = () if pipeline is None else pipeline.tower_edits
        if pipeline is not None and len(edits) < len(pipeline.addons):
            raise ConfigError("Only add-ons that edit towers change patches; leave the others out.")
        encoder, classes = source.embedder.encoder, self._classes()
        window = window_of(encoder, self.short_side, self.stride)
        weights = template_weights(source, [item.names for item in classes], load_templates(self.templates))
        scale = source.logit_scale if self.logit_scale is None else self.logit_scale
        counts, unreadable = [], []
        with editing(encoder, edits):
            for number, scene in enumerate(self.scenes.images):
                try:
                    pixels = read_image(scene.record, exif="ignore")
                except DataError as error:
                    unreadable.append((scene.record.key, str(error)))
                    continue
                probabilities = pixel_probabilities(encoder, pixels, weights, window, scale, self.denoise)
                truth, given = self._truth(scene, pixels), self._decided(probabilities)
                counts.append(_counts(truth, given, len(classes)))
                if self.pictures is not None and number < self.num_pictures:
                    write_segmentation(
                        self.pictures, scene.record.key, pixels, truth, given, probabilities, [c.shown for c in classes]
                    )
                if self.progress:
                    self.progress(number + 1, len(self.scenes.images))
        if not counts:
            raise DataError(f"None of the {len(self.scenes.images)} photographs could be read.")
        names = [addon.name for addon in edits]
        return self._evaluation(counts, unreadable, classes, window, scale, names)

    def _classes(self) -> list[ClassName]:
        named = [parse_class(name) for name in self.class_names or self.scenes.names]
        return named if self.background == "ignored" else [*named, ClassName("background", BACKGROUND_WORDS)]

    def _truth(self, scene: Scene, pixels: Tensor) -> Tensor:
        """(H,W) rows of classes; -1 does not count."""
        if pixels.shape[1:] != (scene.height, scene.width):
            raise DataError(
                f"{scene.record.key} is {pixels.shape[2]} x {pixels.shape[1]} pixels, its masks are made for "
                f"{scene.width} x {scene.height}. Use the photographs the annotations belong to."
            )
        labels = scene.label_map() - 1
        return labels if self.background == "ignored" else labels.where(labels >= 0, len(self.scenes.names))

    def _decided(self, probabilities: Tensor) -> Tensor:
        best = probabilities.max(0)
        if not self.threshold:
            return best.indices
        return best.indices.where(best.values >= self.threshold, len(self.scenes.names))

    def _evaluation(
        self,
        counts: list[_Counts],
        unreadable: list[tuple[str, str]],
        classes: list[ClassName],
        window: Window,
        scale: float,
        edits: list[str],
    ) -> Evaluation:
        columns = _Counts(*(torch.stack(column).double() for column in zip(*counts, strict=True)))
        low, high = _bootstrap(columns, self.seed)
        true, given, hits = (column.sum(0) for column in columns)
        iou = hits / (true + given - hits)
        recall = hits / true
        shown = [item.shown for item in classes]
        return Evaluation(
            metrics={
                "mean_iou": iou[~iou.isnan()].mean().item(),
                "pixel_accuracy": (hits.sum() / true.sum()).item(),
                "mean_accuracy": recall[~recall.isnan()].mean().item(),
            },
            intervals={"mean_iou": (low, high)},
            protocol={
                "classes": len(classes),
                "templates": self.templates,
                "class_score": "maximum over synonyms of softmax over all names",
                "logit_scale": round(scale, 4),
                "background": self.background,
                "threshold": self.threshold,
                "window": f"short side {window.short_side}, window {window.size}, stride {window.stride}",
                "resolution": "the photograph's own; scores enlarged bilinearly",
                "denoise": self.denoise,
                "edits": edits,
                "post_processing": "none",
                "interval": f"95%, percentile bootstrap, {_RESAMPLES} resamples of photographs, seed {self.seed}",
            },
            counts={
                "images": len(counts),
                "classes": len(classes),
                "classes_in_masks": int((true > 0).sum()),
                "unreadable_images": len(unreadable),
            },
            per_item=pa.table(
                {
                    "class": shown,
                    "iou": iou.numpy(),
                    "recall": recall.numpy(),
                    "pixels": true.long().numpy(),
                    "predicted_pixels": given.long().numpy(),
                }
            ),
            figures={"unreadable_images": tuple(unreadable)},
        )


def pixel_probabilities(
    encoder: DualEncoder, pixels: Tensor, weights: ClassWeights, window: Window, scale: float, denoise: float = 0.0
) -> Tensor:
    """Probability (C,H,W) of each class at each pixel of a photograph (3,H,W) uint8.

    With `denoise` above 0, names that are nowhere in the photograph more probable than it are left out.

    Source: Wang et al. 2024 (SCLIP), arXiv:2312.01597; its segmentor: windows' logits averaged, brought to the size of
    the photograph, softmax over all names, then the maximum over a class's names.
    """
    by_name = ClassWeights(weights.vectors, torch.arange(len(weights.vectors)))

    def score(squares: Tensor) -> Tensor:
        return patch_scores(encoder.encode_patches(squares.to(encoder.device)), by_name)

    scores = window_scores(score, pixels, window, encoder.preprocess.interpolation)
    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    logits = scale * enlarged(scores, *size)
    names = (denoised(logits, denoise) if denoise else logits).softmax(0)
    if len(names) == weights.num_classes:
        return names
    index = weights.class_of[:, None, None].expand_as(names)
    start = names.new_zeros(weights.num_classes, *size)
    return start.scatter_reduce(0, index, names, "amax", include_self=False)


def _counts(truth: Tensor, given: Tensor, num_classes: int) -> _Counts:
    counted = truth >= 0
    confusion = confusion_matrix(truth[counted], given[counted], num_classes)
    return _Counts(confusion.sum(1), confusion.sum(0), confusion.diagonal().clone())


def _bootstrap(counts: _Counts, seed: int) -> tuple[float, float]:
    """95% interval of the mIoU when photographs are drawn anew; counts are (N,C)."""
    true, given, hits = counts
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(true), (_RESAMPLES, len(true)), generator=generator)
    times = torch.zeros(_RESAMPLES, len(true), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    inside = times @ hits
    iou = inside / (times @ (true + given) - inside)
    means = iou.nanmean(1)
    bounds = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return bounds[0].item(), bounds[1].item()
