"""The pointing game: whether the hottest point of a class's heat map lies on a thing of that class.

PointingEvaluator(scenes, method="legrad").run(source).metrics["pointing_accuracy"]
"""

from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.coco_instances import Box, Scene, Scenes
from eval.examples import HeatExample
from eval.features import Unreadable, over_photographs
from eval.heat import WHOLE_IMAGES, HeatMaps, check_method, class_vectors, heat_example
from eval.metrics import bootstrap_interval
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import Embedder


class _Row(NamedTuple):
    """One category of one photograph."""

    key: str
    category: int
    x: float  # of the hottest point, in pixels of the photograph
    y: float
    hit: bool
    covered: float  # share of the photograph that counts as a hit


class _Pointed(NamedTuple):
    """What came of one photograph."""

    rows: list[_Row]
    example: HeatExample | None


@dataclass(frozen=True)
class PointingEvaluator(Evaluator):
    """Hits of the hottest point, for every category that a photograph shows.

    Attributes:
        scenes: photographs with objects.
        method: of `eval.heat`.
        templates: a set's name, a file or a text with `{}`.
        tolerance: pixels of the photograph that a point may lie beside a box.
        seed: of the bootstrap.
        num_examples: photographs of which a report shows the map of one category.
        progress: called with (done, total) photographs.
    """

    scenes: Scenes
    method: str = "patches"
    templates: str = "photo"
    tolerance: float = 15.0
    seed: int = 0
    num_examples: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: an unknown method, or a negative tolerance.
        """
        check_method(self.method)
        if self.tolerance < 0:
            raise ConfigError(f"The tolerance is {self.tolerance} pixels; expected 0 or more.")

    def run(self, source: FeatureSource, pipeline: None = None) -> Evaluation:
        """Explain, point, count.

        Args:
            source: a model with a CLIP ViT.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `pointing_accuracy` (mean over categories), `hits` (over all), `chance` (the boxes' share of the
            photograph, tolerance included); `per_item` one row a photograph and category.

        Raises:
            DataError: no readable photograph.
            ModelError: the model has no such tower.

        Source: Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", arXiv:1608.00507, section 4.1
        (15 pixels of tolerance; a hit on any instance).
        Differs: boxes, not masks, for all photographs; the point is the middle of the hottest patch.
        """
        vectors = class_vectors(source, self.scenes.names, self.templates)
        work = _Pointing(vectors, self.method, self.tolerance, self.scenes.names, self.num_examples)
        found, unreadable = over_photographs(source, work, self.scenes.images, self.progress)
        rows = [row for one in found for row in one.rows]
        examples = tuple(one.example for one in found if one.example is not None)
        if not rows:
            raise DataError(f"None of the {len(self.scenes.images)} photographs could be read.")
        hits = torch.tensor([row.hit for row in rows], dtype=torch.float64)
        categories = torch.tensor([row.category for row in rows])
        low, high = bootstrap_interval(hits[:, None], seed=self.seed)
        by_category = [hits[categories == one].mean() for one in categories.unique()]
        return Evaluation(
            metrics={
                "pointing_accuracy": torch.stack(by_category).mean().item(),
                "hits": hits.mean().item(),
                "chance": sum(row.covered for row in rows) / len(rows),
            },
            intervals={"hits": (low[0].item(), high[0].item())},
            protocol={
                "images": WHOLE_IMAGES,
                "method": self.method,
                "templates": self.templates,
                "tolerance": self.tolerance,
                "hit": "hottest patch's middle in or beside any box of the category",
                "interval": f"95%, percentile bootstrap, 1000 resamples of pairs, seed {self.seed}",
            },
            counts={
                "images": len({row.key for row in rows}),
                "pairs": len(rows),
                "classes": len(by_category),
                "unreadable_images": len(unreadable),
            },
            per_item=pa.table(
                {
                    "key": [row.key for row in rows],
                    "class": [self.scenes.names[row.category] for row in rows],
                    "x": [row.x for row in rows],
                    "y": [row.y for row in rows],
                    "hit": [float(row.hit) for row in rows],
                }
            ),
            figures={"unreadable_images": unreadable, "heat_maps": examples},
        )


@dataclass(frozen=True)
class _Pointing:
    """What is done with one photograph: a row for each of its categories."""

    vectors: Tensor
    method: str
    tolerance: float
    names: tuple[str, ...]
    num_examples: int

    def __call__(self, model: Embedder, item: tuple[int, Scene]) -> _Pointed | Unreadable:
        number, scene = item
        heat = HeatMaps(model.encoder, self.vectors, self.method)
        try:
            pixels = heat.pixels(scene.record)
        except DataError as error:
            return Unreadable(scene.record.key, str(error))
        rows = []
        shown = sorted({one.category for one in scene.instances})
        maps = heat.maps(pixels, shown)
        for category, one in zip(shown, maps, strict=True):
            x, y = highest_point(one, scene.height, scene.width)
            boxes = [instance.box for instance in scene.instances if instance.category == category]
            hit = any(box.holds(x, y, self.tolerance) for box in boxes)
            covered = _covered(boxes, scene.height, scene.width, self.tolerance)
            rows.append(_Row(scene.record.key, category, x, y, hit, covered))
        if number >= self.num_examples:
            return _Pointed(rows, None)
        note = f"{self.method}; the hottest patch {'hits' if rows[0].hit else 'misses'}"
        return _Pointed(rows, heat_example(scene.record, self.names[shown[0]], maps[0], note))


def highest_point(heat: Tensor, height: int, width: int) -> tuple[float, float]:
    """x and y, in pixels of the photograph, of the middle of the hottest cell of a heat map (rows,columns)."""
    rows, columns = heat.shape
    place = int(heat.argmax())
    return (place % columns + 0.5) * width / columns, (place // columns + 0.5) * height / rows


def _covered(boxes: list[Box], height: int, width: int, margin: float) -> float:
    inside = torch.zeros(height, width, dtype=torch.bool)
    for box in boxes:
        top, left = max(0, round(box.top - margin)), max(0, round(box.left - margin))
        inside[top : round(box.top + box.height + margin), left : round(box.left + box.width + margin)] = True
    return inside.double().mean().item()
