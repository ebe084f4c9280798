"""Photographs with a picture of labels each: VOC, Context, COCO-Stuff, Cityscapes and ADE20K for segmentation.

    scenes = read_label_folder("voc21")
    SegmentationEvaluator(scenes, background="class").run(source)

Laid out as `images/NAME.jpg` (or .png), `labels/NAME.png` and `names.txt` with one `name | synonym` a line, in the
order of the label numbers. 255 does not count. Where the first line is `background`, 0 is none of the classes: left
out, or a class of its own, as the evaluator is told. Without it 0 is the first name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from eval.coco_instances import Scene, Scenes
from vlkit.data.records import ImageRef, Problems, Record
from vlkit.errors import DataError

BACKGROUND = "background"
VOID = 255
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class LabelledScene(Scene):
    """A photograph whose classes lie in a picture.

    Attributes:
        labels: its file.
        first: the number of the first class: 1 where 0 is the background.
        num_classes: of the names.
    """

    labels: Path = Path()
    first: int = 0
    num_classes: int = 0

    def label_map(self) -> Tensor:
        """(H,W) int64: 1 + class, 0 for the background, -1 for what does not count.

        Raises:
            DataError: not a picture of numbers, another size, or a number that is no class.
        """
        try:
            with Image.open(self.labels) as picture:
                if picture.mode not in ("L", "P", "I", "I;16"):
                    raise DataError(f"{self.labels} has mode {picture.mode}; expected one number a pixel (L or P).")
                found = torch.from_numpy(np.asarray(picture).astype(np.int64))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"Cannot read the labels {self.labels}: {error}.") from error
        if tuple(found.shape) != (self.height, self.width):
            raise DataError(
                f"{self.labels} is {found.shape[1]} x {found.shape[0]} pixels, its photograph {self.width} x "
                f"{self.height}; expected one label a pixel."
            )
        classes = found - self.first + 1
        counted = found != VOID
        if counted.any() and int(classes[counted].max()) > self.num_classes:
            raise DataError(
                f"{self.labels} has the label {int(found[counted].max())}; the names have {self.num_classes} classes."
            )
        return classes.where(counted, -1)


def read_label_folder(folder: str | Path) -> Scenes:
    """All photographs that have labels.

    Raises:
        DataError: no names, no photograph with labels, or a photograph that cannot be read.
    """
    place = Path(folder)
    try:
        lines = (place / "names.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {place / 'names.txt'}: {error}. Expected one name of a class a line.") from error
    names = [line.strip() for line in lines if line.strip()]
    first = 1 if names and names[0].partition("|")[0].strip() == BACKGROUND else 0
    if not names[first:]:
        raise DataError(f"{place / 'names.txt'} names no class.")
    problems = Problems()
    scenes = tuple(_scenes(place, first, len(names) - first, problems))
    if not scenes:
        raise DataError(f"{place} has no photograph images/NAME.jpg with labels/NAME.png.")
    return Scenes(scenes, tuple(names[first:]), place, problems)


def _scenes(place: Path, first: int, num_classes: int, problems: Problems) -> Iterator[LabelledScene]:
    for path in sorted((place / "images").glob("*")):
        labels = place / "labels" / f"{path.stem}.png"
        if path.suffix.lower() not in _SUFFIXES:
            continue
        if not labels.is_file():
            problems.add("photograph without labels", path.name)
            continue
        try:
            with Image.open(path) as picture:
                width, height = picture.size
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"Cannot read the photograph {path}: {error}.") from error
        yield LabelledScene(Record(path.name, ImageRef(path=str(path))), height, width, (), labels, first, num_classes)


def is_label_folder(folder: str | Path) -> bool:
    """Whether a folder is laid out like this."""
    return (Path(folder) / "names.txt").is_file() and (Path(folder) / "labels").is_dir()
