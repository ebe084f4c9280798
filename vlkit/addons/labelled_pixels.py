"""Labelled images read anew for every step, each time cut otherwise: for methods with gradients into the image.

pixels = LabelledPixels(part.records, encoder.preprocess, crop=0.08, seed=0)
pixels.batch(rows)                    # (b,3,S,S) uint8; the second time the same rows come in other crops
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlkit.data.augment import Augment
from vlkit.data.images import read_image
from vlkit.data.randomness import generator
from vlkit.data.records import Record
from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError

# One thread decodes as fast as a CPU trains, and a few keep up with a GPU.
_MOST_WORKERS = 8


@dataclass(frozen=True)
class LabelledPixels:
    """Images of records, mirrored and cropped by seed.

    Attributes:
        records: n images.
        preprocess: of the model.
        crop: smallest share of an image's area that a crop shows; 1: the model's own preprocessing in place of crops.
        seed: of the draws: the k-th time an image is asked for it looks the same in every run.
    """

    records: Sequence[Record]
    preprocess: Preprocess
    crop: float
    seed: int
    _shown: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a share that is none.
        """
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop is {self.crop}; expected a share of the image's area, above 0 and at most 1.")

    def batch(self, rows: Tensor) -> Tensor:
        """(b,3,S,S) uint8 of images (b,).

        Raises:
            DataError: an image that cannot be read any more.
        """
        asked = []
        for row in rows.tolist():
            asked.append((row, self._shown[row]))
            self._shown[row] += 1
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_WORKERS)) as pool:
            return torch.stack(list(pool.map(self._one, *zip(*asked, strict=True))))

    def _one(self, row: int, time: int) -> Tensor:
        image, random = read_image(self.records[row]), generator(self.seed, time, row, "labelled pixels")
        if self.crop == 1:
            square = self.preprocess(image)
            return square.flip(2) if random.random() < 0.5 else square
        augment = Augment(crop_scale=(self.crop, 1.0), hflip=0.5)
        return augment.apply(image, self.preprocess.size, self.preprocess.interpolation, random)
