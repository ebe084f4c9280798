"""Heat maps of photographs for class names by any method, for evaluators that measure them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.data.images import read_image
from vlkit.data.records import Record
from vlkit.errors import ConfigError, did_you_mean
from vlkit.features.source import FeatureSource
from vlkit.interpret.explain import EXPLAINERS, explain

PATCHES, CENTRE = "patches", "centre"
METHODS = (*EXPLAINERS, PATCHES, CENTRE)


def check_method(method: str) -> None:
    """Refuse an unknown way of explaining.

    Raises:
        ConfigError: names the nearest.
    """
    if method not in METHODS:
        raise ConfigError(f"No way of making heat maps is called {method!r}. {did_you_mean(method, METHODS)}")


class HeatMaps:
    """Heat maps of one model for the classes of one data set.

    Args:
        source: the model.
        names: (C,).
        templates: a set's name, a file or a text with `{}`.
        method: decomposition, legrad, relevance; "patches" is the cosine of each patch; "centre" looks at nothing: it
            is highest in the middle of every image, which is where photographers put things.

    Raises:
        ConfigError: an unknown method or set of templates.
    """

    def __init__(self, source: FeatureSource, names: Sequence[str], templates: str, method: str) -> None:
        check_method(method)
        self.encoder = source.embedder.encoder
        self.method = method
        self.vectors = template_weights(source, [(name,) for name in names], load_templates(templates)).vectors
        # The whole photograph, so that places in the map are places in it.
        self.preprocess = replace(self.encoder.preprocess, resize_mode="squash", crop_pct=1.0)

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
