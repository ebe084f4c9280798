"""Heat maps of photographs for class names by any method, for evaluators that measure them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.examples import HeatExample
from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.data.images import read_image
from vlkit.data.records import Record
from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError, did_you_mean
from vlkit.features.source import FeatureSource
from vlkit.interpret.explain import EXPLAINERS, explain
from vlkit.models.dual_encoder import DualEncoder

PATCHES, CENTRE = "patches", "centre"
METHODS = (*EXPLAINERS, PATCHES, CENTRE)
# How `HeatMaps.pixels` reads photographs, for the record.
WHOLE_IMAGES = "the whole photograph, resized to the model's square; EXIF ignored"
_MOST_CELLS = 16


def class_vectors(source: FeatureSource, names: Sequence[str], templates: str) -> Tensor:
    """(C,D) of class names through a set of templates.

    Raises:
        ConfigError: an unknown set of templates.
    """
    return template_weights(source, [(name,) for name in names], load_templates(templates)).vectors


def check_method(method: str) -> None:
    """Refuse an unknown way of explaining.

    Raises:
        ConfigError: names the nearest.
    """
    if method not in METHODS:
        raise ConfigError(f"No way of making heat maps is called {method!r}. {did_you_mean(method, METHODS)}")


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of one model for the classes of one data set.

    Attributes:
        encoder: of the model.
        vectors: (C,D) of the class names, see `class_vectors`.
        method: decomposition, legrad, relevance; "patches" is the cosine of each patch; "centre" looks at nothing: it
            is highest in the middle of every image, which is where photographers put things.
    """

    encoder: DualEncoder
    vectors: Tensor
    method: str

    @cached_property
    def preprocess(self) -> Preprocess:
        """The whole photograph, so that places in the map are places in it."""
        return replace(self.encoder.preprocess, resize_mode="squash", crop_pct=1.0)

    def pixels(self, record: Record) -> Tensor:
        """(3,S,S) uint8 of the whole photograph, its aspect ratio lost.

        Raises:
            DataError: it cannot be read.
        """
        return self.preprocess(read_image(record, exif="ignore"))

    def maps(self, pixels: Tensor, classes: Sequence[int]) -> Tensor:
        """(c,rows,columns) of one photograph for some classes, on the CPU.

        Raises:
            ModelError: the model has no such tower.
        """
        images = pixels[None].to(self.encoder.device)
        rows, columns = self.encoder.vision_tower.grid
        if self.method == CENTRE:
            y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
            return (-(x.square() + y.square())).expand(len(classes), -1, -1)
        vectors = self.vectors.to(self.encoder.device)
        if self.method == PATCHES:
            with torch.no_grad():
                patches = self.encoder.encode_patches(images)[0].float()
            found: Tensor = (vectors[list(classes)] @ patches.T).unflatten(1, (rows, columns)).cpu()
            return found
        if self.method == "decomposition":  # it compares every class with all others
            return explain(self.encoder, images, vectors, self.method)[0, list(classes)].cpu()
        return explain(self.encoder, images, vectors[list(classes)], self.method)[0].detach().cpu()


def heat_example(record: Record, text: str, heat: Tensor, note: str) -> HeatExample:
    """A heat map (rows,columns) over a whole photograph as a report draws it: from its least to its greatest value.

    Args:
        record: the photograph.
        text: what was looked for.
        heat: any size; at most 16 cells a side are kept.
        note: what came of it.
    """
    longest = max(heat.shape)
    rows, columns = (max(1, round(side * min(longest, _MOST_CELLS) / longest)) for side in heat.shape)
    small = F.adaptive_avg_pool2d(heat[None, None].float(), (rows, columns))[0, 0]
    small = (small - small.min()) / (small.max() - small.min()).clamp(min=1e-12)
    values = tuple(tuple(round(value, 3) for value in row) for row in small.tolist())
    return HeatExample(record, text, values, note)
