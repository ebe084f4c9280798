"""How good heat maps are: do they cover the thing, and do the patches they name decide the score.

ExplanationEvaluator(scenes, method="legrad").run(source).metrics["mean_iou"]
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.coco_instances import Scene, Scenes
from eval.examples import HeatExample
from eval.features import Unreadable, over_photographs
from eval.heat import WHOLE_IMAGES, HeatMaps, check_method, class_vectors, heat_example
from eval.metrics import bootstrap_interval, label_average_precision, mean_iou
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.errors import DataError
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import Embedder

# Shares of the patches that are taken away or put back.
STEPS = 10


class _Row(NamedTuple):
    """One photograph."""

    key: str
    category: int
    values: tuple[float, float, float, float]  # pixel accuracy, average precision, deletion, insertion
    confusion: Tensor  # (2,2) pixels by truth and map: rest and thing
    example: HeatExample | None


@dataclass(frozen=True)
class ExplanationEvaluator(Evaluator):
    """Localisation and faithfulness of one method, for the largest category of each photograph.

    Attributes:
        scenes: photographs with masks.
        method: of `eval.heat`.
        templates: a set's name, a file or a text with `{}`.
        seed: of the bootstrap.
        num_examples: photographs of which a report shows the map.
        progress: called with (done, total) photographs.
    """

    scenes: Scenes
    method: str = "legrad"
    templates: str = "photo"
    seed: int = 0
    num_examples: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: an unknown method.
        """
        check_method(self.method)

    def run(self, source: FeatureSource, pipeline: None = None) -> Evaluation:
        """Explain, compare with masks, take patches away and put them back.

        Args:
            source: a model with a CLIP ViT.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `pixel_accuracy`, `mean_iou` (of thing and rest, over all pixels), `average_precision` (mean over
            photographs), `deletion` and `insertion` (area under the category's probability while patches go or come,
            the hottest first: low and high are good); `per_item` one row a photograph.

        Raises:
            DataError: no readable photograph.
            ModelError: the model has no such tower.

        Source: Chefer et al. 2021, arXiv:2103.15679, section 5 (a map above its own mean is the thing; pixel accuracy,
        mIoU, mAP); Petsiuk et al. 2018, "RISE", arXiv:1806.07421 (deletion and insertion).
        Differs: at the model's resolution, the photograph squashed into its square; steps of a tenth of the patches;
        patches go to, and come from, the model's mean colour.
        """
        vectors = class_vectors(source, self.scenes.names, self.templates)
        work = _Explaining(vectors, self.method, source.logit_scale, self.scenes.names, self.num_examples)
        found, unreadable = over_photographs(source, work, self.scenes.images, self.progress)
        rows = [one for one in found if one is not None]
        examples = tuple(row.example for row in rows if row.example is not None)
        if not rows:
            raise DataError(f"None of the {len(self.scenes.images)} photographs could be read.")
        values = torch.tensor([row.values for row in rows], dtype=torch.float64)
        confusion = torch.stack([row.confusion for row in rows]).sum(0)
        low, high = bootstrap_interval(values, seed=self.seed)
        keys = ("pixel_accuracy", "average_precision", "deletion", "insertion")
        return Evaluation(
            metrics={"mean_iou": mean_iou(confusion)} | dict(zip(keys, values.mean(0).tolist(), strict=True)),
            intervals={key: (low[n].item(), high[n].item()) for n, key in enumerate(keys)},
            protocol={
                "images": WHOLE_IMAGES,
                "method": self.method,
                "templates": self.templates,
                "thing": "the category that fills most of the photograph",
                "threshold": "the map's mean",
                "steps": STEPS,
                "interval": f"95%, percentile bootstrap, 1000 resamples of photographs, seed {self.seed}",
            },
            counts={
                "images": len(rows),
                "classes": len(self.scenes.names),
                "photographs_of_thin_things": len(found) - len(rows),
                "unreadable_images": len(unreadable),
            },
            per_item=pa.table(
                {
                    "key": [row.key for row in rows],
                    "class": [self.scenes.names[row.category] for row in rows],
                    **{key: values[:, n].numpy() for n, key in enumerate(keys)},
                }
            ),
            figures={"unreadable_images": unreadable, "heat_maps": examples},
        )


@dataclass(frozen=True)
class _Explaining:
    """What is done with one photograph; None where its thing is too thin for the model's pixels."""

    vectors: Tensor
    method: str
    logit_scale: float
    names: tuple[str, ...]
    num_examples: int

    def __call__(self, model: Embedder, item: tuple[int, Scene]) -> _Row | Unreadable | None:
        number, scene = item
        heat = HeatMaps(model.encoder, self.vectors, self.method)
        try:
            pixels = heat.pixels(scene.record)
        except DataError as error:
            return Unreadable(scene.record.key, str(error))
        category, mask = largest_thing(scene, pixels.shape[1])
        if not mask.any():
            return None
        one = heat.maps(pixels, [category])[0]
        found = F.interpolate(one[None, None].float(), mask.shape, mode="bilinear", align_corners=False)[0, 0]
        given = (found > found.mean()).flatten()
        confusion = (2 * mask.flatten().long() + given.long()).bincount(minlength=4).view(2, 2)
        # On a scale of its own, since ties are told by an absolute difference.
        level = (found - found.min()) / (found.max() - found.min()).clamp(min=1e-12)
        precision = label_average_precision(level.flatten()[:, None], mask.flatten()[:, None]).mean()
        gone, back = perturbed(pixels, one, heat.encoder.preprocess.mean)
        lost, won = (area(self._curve(heat, images, category)) for images in (gone, back))
        own = (mask.flatten() == given).double().mean().item()
        note = f"{self.method}; average precision {precision:.0%}"
        example = heat_example(scene.record, self.names[category], one, note) if number < self.num_examples else None
        return _Row(scene.record.key, category, (own, precision, lost, won), confusion, example)

    @torch.no_grad()
    def _curve(self, heat: HeatMaps, images: Tensor, category: int) -> Tensor:
        """(STEPS+1,) probability of the category among all."""
        features = heat.encoder.encode_image(images.to(heat.encoder.device)).float()
        vectors = heat.vectors.to(features.device)
        return (self.logit_scale * features @ vectors.T).softmax(1)[:, category].cpu()


def largest_thing(scene: Scene, size: int) -> tuple[int, Tensor]:
    """The category with most pixels, and its mask (size,size) bool of the photograph squashed into a square."""
    labels = scene.label_map()
    counts = labels[labels > 0].bincount()
    category = int(counts.argmax()) - 1 if len(counts) else scene.instances[0].category
    # The middle of each pixel of the square, looked up in the photograph.
    rows = ((torch.arange(size) + 0.5) * scene.height / size).long()
    columns = ((torch.arange(size) + 0.5) * scene.width / size).long()
    return category, labels[rows][:, columns] == category + 1


def perturbed(pixels: Tensor, heat: Tensor, colour: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """A photograph (3,S,S) losing its patches, and a plain one getting them, the hottest first: (STEPS+1,3,S,S) each.

    Args:
        pixels: uint8.
        heat: (rows,columns).
        colour: of a patch that is not there, each channel on [0,1].
    """
    size, cells = pixels.shape[1], heat.numel()
    place = torch.empty(cells, dtype=torch.int64)
    place[heat.flatten().argsort(descending=True, stable=True)] = torch.arange(cells)
    order = F.interpolate(place.view(1, 1, *heat.shape).float(), (size, size), mode="nearest")[0]
    plain = (torch.tensor(colour) * 255).round().to(torch.uint8)[:, None, None].expand_as(pixels)
    gone, back = [], []
    for step in range(STEPS + 1):
        taken = order < round(cells * step / STEPS)
        gone.append(torch.where(taken, plain, pixels))
        back.append(torch.where(taken, pixels, plain))
    return torch.stack(gone), torch.stack(back)


def area(curve: Tensor) -> float:
    """Under a curve (n,) over [0,1], by the trapezoid rule."""
    return float(np.trapezoid(curve.double().numpy(), dx=1 / (len(curve) - 1)))
