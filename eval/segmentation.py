"""Zero-shot segmentation: every pixel gets the class its patches are most similar to; mIoU against masks.

SegmentationEvaluator(read_instances("coco_small")).run(source).metrics["mean_iou"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.coco_instances import Scene, Scenes
from eval.examples import HeatExample
from eval.features import Unreadable, over_photographs
from eval.heat import heat_example
from eval.mask_refinement import DILATIONS, check_refinement, refine_masks
from eval.metrics import confusion_matrix
from eval.segmentation_pictures import write_segmentation
from vlkit.addons.class_names import ClassName, parse_class
from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.pair_scores.pacl import Pacl
from vlkit.addons.passes import editing
from vlkit.addons.patch_scores import Window, denoised, enlarged, patch_scores, window_of, window_scores
from vlkit.addons.pipeline import Pipeline
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.images import read_image
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import Embedder

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


class _Measured(NamedTuple):
    """What came of one photograph."""

    counts: _Counts
    example: HeatExample | None


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
        refine_steps, refine_dilations: of `eval.mask_refinement` (PAMR) on the scores; 0 steps leave them alone.
        pictures: folder for a sheet of each of the first `num_pictures` photographs.
        num_pictures: how many.
        seed: of the bootstrap.
        num_examples: photographs of which a report shows where their largest class was seen.
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
    refine_steps: int = 0
    refine_dilations: tuple[int, ...] = DILATIONS
    pictures: Path | None = None
    num_pictures: int = 12
    seed: int = 0
    num_examples: int = 0
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
        check_refinement(self.refine_steps, self.refine_dilations)

    def run(self, source: FeatureSource, pipeline: Pipeline | None = None) -> Evaluation:
        """Score pixels, count.

        Args:
            source: a model with patches in the joint space.
            pipeline: fitted; edits of the towers change the patches, pacl's head aligns them; nothing else is used.

        Returns:
            Metrics `mean_iou` (over classes in truth or prediction), `pixel_accuracy`, `mean_accuracy` (over classes
            in the truth); `per_item` one row a class; `figures["pixels"]` the counts of each photograph.

        Raises:
            ConfigError: an add-on that does not change patches, a window that does not fit.
            DataError: no readable photograph.
            ModelError: no patches in the joint space.
        """
        edits = () if pipeline is None else pipeline.tower_edits
        scoring = None if pipeline is None else pipeline.scoring
        head = scoring if isinstance(scoring, Pacl) else None
        if pipeline is not None and len(edits) + (head is not None) < len(pipeline.addons):
            raise ConfigError("Only add-ons that edit towers, and pacl, change patches; leave the others out.")
        encoder, classes = source.embedder.encoder, self._classes()
        window = window_of(encoder, self.short_side, self.stride)
        weights = template_weights(source, [item.names for item in classes], load_templates(self.templates))
        scale = source.logit_scale if self.logit_scale is None else self.logit_scale
        # Without the photographs: whoever shares the work gets one at a time.
        settings = replace(self, scenes=replace(self.scenes, images=()), progress=None)
        work = _Segmenting(settings, weights, tuple(item.shown for item in classes), window, scale, head)
        with editing(encoder, edits):
            found, unreadable = over_photographs(source, work, self.scenes.images, self.progress)
        counts = [one.counts for one in found]
        examples = tuple(one.example for one in found if one.example is not None)
        if not counts:
            raise DataError(f"None of the {len(self.scenes.images)} photographs could be read.")
        names = [addon.name for addon in pipeline.addons] if pipeline else []
        figures = {"unreadable_images": unreadable, "heat_maps": examples}
        return self._evaluation(counts, figures, classes, window, scale, names)

    def _classes(self) -> list[ClassName]:
        named = [parse_class(name) for name in self.class_names or self.scenes.names]
        return named if self.background == "ignored" else [*named, ClassName("background", BACKGROUND_WORDS)]

    def truth(self, scene: Scene, pixels: Tensor) -> Tensor:
        """(H,W) rows of classes of the masks; what is below 0 does not count.

        Raises:
            DataError: the photograph (3,H,W) is of another size than the masks.
        """
        if pixels.shape[1:] != (scene.height, scene.width):
            raise DataError(
                f"{scene.record.key} is {pixels.shape[2]} x {pixels.shape[1]} pixels, its masks are made for "
                f"{scene.width} x {scene.height}. Use the photographs the annotations belong to."
            )
        labels = scene.label_map() - 1
        return labels if self.background == "ignored" else labels.where(labels != -1, len(self.scenes.names))

    def decided(self, probabilities: Tensor) -> Tensor:
        """(H,W) rows of classes out of (C,H,W)."""
        best = probabilities.max(0)
        if not self.threshold:
            return best.indices
        return best.indices.where(best.values >= self.threshold, len(self.scenes.names))

    def _evaluation(
        self,
        counts: list[_Counts],
        figures: dict[str, tuple[Any, ...]],
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
                "post_processing": self._post_processing(),
                "interval": f"95%, percentile bootstrap, {_RESAMPLES} resamples of photographs, seed {self.seed}",
            },
            counts={
                "images": len(counts),
                "classes": len(classes),
                "classes_in_masks": int((true > 0).sum()),
                "unreadable_images": len(figures["unreadable_images"]),
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
            figures={**figures, "pixels": columns},
        )

    def _post_processing(self) -> str:
        if not self.refine_steps:
            return "none"
        return f"PAMR, {self.refine_steps} steps, dilations {', '.join(map(str, self.refine_dilations))}"


@dataclass(frozen=True)
class _Segmenting:
    """What is done with one photograph."""

    settings: SegmentationEvaluator
    weights: ClassWeights
    names: tuple[str, ...]
    window: Window
    scale: float
    head: Pacl | None = None

    def __call__(self, model: Embedder, item: tuple[int, Scene]) -> _Measured | Unreadable:
        number, scene = item
        try:
            pixels = read_image(scene.record, exif="ignore")
        except DataError as error:
            return Unreadable(scene.record.key, str(error))
        settings = self.settings
        truth = settings.truth(scene, pixels)
        refining = (settings.refine_steps, settings.refine_dilations)
        probabilities = pixel_probabilities(
            model.encoder, pixels, self.weights, self.window, self.scale, settings.denoise, refining, self.head
        )
        given = settings.decided(probabilities)
        if settings.pictures is not None and number < settings.num_pictures:
            write_segmentation(settings.pictures, scene.record.key, pixels, truth, given, probabilities, self.names)
        counts = _counts(truth, given, len(self.names))
        example = self._example(scene, probabilities, counts) if number < settings.num_examples else None
        return _Measured(counts, example)

    def _example(self, scene: Scene, probabilities: Tensor, counts: _Counts) -> HeatExample:
        """Where the photograph's largest category was seen."""
        largest = int(counts.true[: len(self.settings.scenes.names)].argmax())
        hits, union = int(counts.hits[largest]), int(counts.true[largest] + counts.given[largest])
        note = f"probability up to {probabilities[largest].max():.0%}; IoU {hits / max(union - hits, 1):.0%}"
        return heat_example(scene.record, self.names[largest], probabilities[largest], note)


def mean_iou_difference(first: Evaluation, second: Evaluation, seed: int = 0) -> tuple[float, float, float]:
    """mIoU of the second evaluation less that of the first, and its 95% interval.

    Both are of the same photographs, which are drawn anew together.

    Raises:
        ValueError: photographs or classes that differ in number.
    """
    one, other = (evaluation.figures["pixels"] for evaluation in (first, second))
    if one.true.shape != other.true.shape:
        raise ValueError(f"{tuple(one.true.shape)} and {tuple(other.true.shape)} photographs and classes.")
    change = _resampled(other, seed) - _resampled(one, seed)
    bounds = torch.quantile(change, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return second.metrics["mean_iou"] - first.metrics["mean_iou"], bounds[0].item(), bounds[1].item()


def pixel_probabilities(
    encoder: DualEncoder,
    pixels: Tensor,
    weights: ClassWeights,
    window: Window,
    scale: float,
    denoise: float = 0.0,
    refining: tuple[int, Sequence[int]] = (0, DILATIONS),
    head: Pacl | None = None,
) -> Tensor:
    """Probability (C,H,W) of each class at each pixel of a photograph (3,H,W) uint8.

    With `denoise` above 0, names that are nowhere in the photograph more probable than it are left out. `refining` is
    steps and dilations of PAMR on the scores of the names. Patches aligned by a `head` stand in place of the model's.

    Source: Wang et al. 2024 (SCLIP), arXiv:2312.01597; its segmentor: windows' logits averaged, brought to the size of
    the photograph, refined there, softmax over all names, then the maximum over a class's names.
    """
    by_name = ClassWeights(weights.vectors, torch.arange(len(weights.vectors)))

    def score(squares: Tensor) -> Tensor:
        here = squares.to(encoder.device)
        patches = encoder.encode_patches(here) if head is None else head.patches_of(encoder.patch_tokens(here))
        return patch_scores(patches, by_name)

    scores = window_scores(score, pixels, window, encoder.preprocess.interpolation)
    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    logits = scale * refine_masks(pixels, enlarged(scores, *size), *refining)
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
    bounds = torch.quantile(_resampled(counts, seed), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return bounds[0].item(), bounds[1].item()


def _resampled(counts: _Counts, seed: int) -> Tensor:
    """(resamples,) mIoU of photographs drawn anew: for one seed the same ones, whatever was measured on them."""
    true, given, hits = counts
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(true), (_RESAMPLES, len(true)), generator=generator)
    times = torch.zeros(_RESAMPLES, len(true), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    inside = times @ hits
    iou = inside / (times @ (true + given) - inside)
    means: Tensor = iou.nanmean(1)
    return means
