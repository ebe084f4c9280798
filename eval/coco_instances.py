"""COCO instances: objects of photographs with category, box and mask.

scenes = read_instances("coco_small")
scenes.images[0].label_map()        # (H,W): 0 where nothing is annotated, else 1 + the category's row
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from vlkit.data.records import ImageRef, Problems, Record
from vlkit.data.sources.annotated import read_json
from vlkit.data.sources.coco import ANNOTATION_FOLDERS, IMAGE_FOLDERS, coco_file_names
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.errors import DataError

# Grid on which polygons are filled, for each pixel and axis.
_FINER = 4


class Box(NamedTuple):
    """COCO's box, in pixels of the photograph."""

    left: float
    top: float
    width: float
    height: float

    def holds(self, x: float, y: float, margin: float = 0.0) -> bool:
        """Whether a point lies in the box, or at most `margin` pixels beside it."""
        return (
            self.left - margin <= x <= self.left + self.width + margin
            and self.top - margin <= y <= self.top + self.height + margin
        )


@dataclass(frozen=True)
class Instance:
    """One object.

    Attributes:
        category: row of the category's name.
        box: around it.
        area: of its mask, in pixels.
        crowd: several objects under one mask.
        shape: COCO's `segmentation`: polygons, or run lengths.
        identifier: COCO's id of the annotation.
    """

    category: int
    box: Box
    area: float
    crowd: bool
    shape: Any
    identifier: int = -1

    def mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """(H,W).

        Raises:
            DataError: run lengths of another size.

        Differs: polygons are filled by pillow, so single pixels on an outline differ from those of COCO's own tools.
        """
        if isinstance(self.shape, dict):
            return decode_runs(self.shape, height, width)
        out = np.zeros((height, width), np.bool_)
        for polygon in self.shape:
            _fill(out, np.array(polygon, dtype=np.float64).reshape(-1, 2))
        return out


@dataclass(frozen=True)
class Scene:
    """A photograph and its objects."""

    record: Record
    height: int
    width: int
    instances: tuple[Instance, ...]

    def label_map(self) -> Tensor:
        """(H,W) int64: 0 where no object is, else 1 + category; crowds lowest, then large objects under small ones."""
        out = np.zeros((self.height, self.width), np.int64)
        for one in sorted(self.instances, key=lambda one: (not one.crowd, -one.area)):
            out[one.mask(self.height, self.width)] = 1 + one.category
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Scenes:
    """All photographs of one file.

    Attributes:
        images: with at least one object.
        names: (C,) categories, in the order of the file.
        root: the file.
        problems: what was left out.
    """

    images: tuple[Scene, ...]
    names: tuple[str, ...]
    root: Path
    problems: Problems


def read_instances(path: str | Path, images: str | Path | None = None) -> Scenes:
    """Read `instances_*.json` in COCO's format.

    Args:
        path: the file, or the folder that holds it or holds `annotations/`.
        images: folder of the photographs, where it is not one of COCO's beside the annotations.

    Raises:
        DataError: no such file, several, another structure, or no photograph found.
    """
    file = _file(Path(path))
    document = read_json(file)
    if not isinstance(document, dict) or not all(
        isinstance(document.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{file} is no COCO instances file; expected lists `images`, `annotations` and `categories`.")
    problems = Problems()
    try:
        rows = {row["id"]: place for place, row in enumerate(document["categories"])}
        names = tuple(str(row["name"]) for row in document["categories"])
        objects = _objects(document["annotations"], rows, problems)
        stated = [
            (row["id"], str(row["file_name"]), int(row["height"]), int(row["width"])) for row in document["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: an entry is not of COCO's form ({type(error).__name__}: {error}).") from error
    above = file.parent.name in ANNOTATION_FOLDERS
    lookup = ImageLookup(image_folders(file, IMAGE_FOLDERS, None if images is None else Path(images), also_above=above))
    scenes = []
    for identifier, name, height, width in stated:
        found = lookup.find(coco_file_names(identifier, name))
        if found is None:
            problems.add("photograph that is not there", name)
        elif identifier not in objects:
            problems.add("photograph without an object", name)
        else:
            record = Record(name, ImageRef(path=str(found)))
            scenes.append(Scene(record, height, width, tuple(objects[identifier])))
    if not scenes:
        raise DataError(f"None of the {len(stated)} photographs of {file} was found. Name their folder with --images.")
    return Scenes(tuple(scenes), names, file, problems)


def _fill(out: NDArray[np.bool_], corners: NDArray[np.float64]) -> None:
    """Set the pixels whose centres lie within a polygon (n,2) of x and y."""
    height, width = out.shape
    left, top = np.floor(corners.min(0)).astype(int).clip(0, [width - 1, height - 1])
    right, bottom = np.ceil(corners.max(0)).astype(int).clip(1, [width, height])
    if right <= left or bottom <= top:
        return
    # Pillow also fills every pixel an outline touches; on a finer grid that hardly matters.
    fine = Image.new("1", (int(right - left) * _FINER, int(bottom - top) * _FINER))
    points = ((corners - [left, top]) * _FINER).ravel().tolist()
    ImageDraw.Draw(fine).polygon(points, fill=1)
    centres = np.array(fine, dtype=np.bool_)[_FINER // 2 :: _FINER, _FINER // 2 :: _FINER]
    out[top:bottom, left:right] |= centres


def decode_runs(shape: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """(H,W) of COCO's run lengths: alternately outside and inside, column by column; a list, or packed in a string.

    Raises:
        DataError: the runs do not fill the photograph.
    """
    counts = shape.get("counts")
    runs = _unpacked(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or sum(runs) != height * width or min(runs, default=0) < 0:
        raise DataError(f"Run lengths of a mask do not fill {width} x {height} pixels; the annotations are damaged.")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _unpacked(text: str) -> list[int]:
    """COCO's packed run lengths: five bits a character, signed, from the third on as difference to two before."""
    runs: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            bits = ord(text[place]) - 48
            value |= (bits & 0x1F) << shift
            shift, more, place = shift + 5, bool(bits & 0x20) and place + 1 < len(text), place + 1
            if not more and bits & 0x10:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def _objects(annotations: Sequence[Any], rows: dict[Any, int], problems: Problems) -> dict[Any, list[Instance]]:
    found: dict[Any, list[Instance]] = {}
    for row in annotations:
        shape, box = row["segmentation"], [float(side) for side in row["bbox"]]
        if row["category_id"] not in rows or not shape or len(box) != 4 or min(box[2:]) <= 0:
            problems.add("object without category, box or mask", str(row.get("id")))
            continue
        category, crowd = rows[row["category_id"]], bool(row.get("iscrowd"))
        one = Instance(category, Box(*box), float(row["area"]), crowd, shape, int(row.get("id", -1)))
        found.setdefault(row["image_id"], []).append(one)
    return found


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("instances_*.json")) or sorted((path / "annotations").glob("instances_*.json"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} holds {names} of COCO's instances_*.json; expected one. Name the file itself.")
    return files[0]
