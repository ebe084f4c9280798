"""Referring expressions: RefCOCO's files, and a substitute made from COCO's instances."""

from collections import Counter
from pathlib import Path
from typing import Any

from eval.coco_instances import Scenes, read_instances
from eval.grounding import Expression
from eval.plain_pickle import load_plain
from vlkit.errors import DataError


def read_refcoco(file: str | Path, images: str | Path, split: str = "val") -> tuple[list[Expression], int]:
    """RefCOCO, RefCOCO+ and RefCOCOg: `refs(unc).p` and the like, with `instances.json` beside it.

    Boxes are all of an image's objects, crowds too, as in the released evaluation on ground-truth boxes.

    Args:
        file: the pickle: a list of {"ann_id", "file_name", "image_id", "sentences": [{"sent"}], "split"}.
        images: folder of COCO's photographs.
        split: val, testA, testB, test or train.

    Returns:
        Expressions, and how many sentences were left out since their image or a second box is missing.

    Raises:
        DataError: a pickle that holds more than plain data, another form, or nothing of the split.

    Source: Yu et al. 2016, "Modeling Context in Referring Expressions", arXiv:1608.00272, and its `refer` files.
    """
    place = Path(file)
    rows = load_plain(place)
    scenes = read_instances(place.with_name("instances.json"), images)
    by_id = {_number(scene.record.key): scene for scene in scenes.images}
    found: list[Expression] = []
    missing = 0
    for row in _references(rows, place):
        if row["split"] != split:
            continue
        scene = by_id.get(int(row["image_id"]))
        ids = [one.identifier for one in scene.instances] if scene is not None else []
        if scene is None or len(ids) < 2 or row["ann_id"] not in ids:
            missing += len(row["sentences"])
            continue
        boxes = tuple(one.box for one in scene.instances)
        for number, sentence in enumerate(row["sentences"]):
            key = f"{row.get('ref_id', row['ann_id'])}#{number}"
            found.append(Expression(key, scene.record, str(sentence["sent"]), boxes, ids.index(row["ann_id"])))
    if not found:
        splits = ", ".join(sorted({str(row["split"]) for row in _references(rows, place)}))
        raise DataError(f"{place} has no expression of split {split!r} with its image; its splits are {splits}.")
    return found, missing


def unique_objects(scenes: Scenes, min_share: float = 0.01, most_boxes: int = 20) -> list[Expression]:
    """A substitute for written expressions: the name of a category of which an image holds one object.

    Where it holds two, "the NAME on the left" and "on the right" mean them. Boxes are the image's objects, crowds and
    tiny ones left out.

    Args:
        scenes: photographs with objects.
        min_share: smallest box, as a share of the photograph.
        most_boxes: photographs with more boxes are left out.

    Raises:
        DataError: no photograph with two objects.
    """
    found: list[Expression] = []
    for scene in scenes.images:
        smallest = min_share * scene.height * scene.width
        kept = [one for one in scene.instances if not one.crowd and one.box.width * one.box.height >= smallest]
        if not 2 <= len(kept) <= most_boxes:
            continue
        boxes, counts = tuple(one.box for one in kept), Counter(one.category for one in kept)
        for row, one in enumerate(kept):
            name, key = f"the {scenes.names[one.category]}", f"{scene.record.key}#{row}"
            if counts[one.category] == 1:
                found.append(Expression(key, scene.record, name, boxes, row))
            elif counts[one.category] == 2:
                twin = next(box for n, box in enumerate(boxes) if n != row and kept[n].category == one.category)
                side = "left" if one.box.left + one.box.width / 2 < twin.left + twin.width / 2 else "right"
                found.append(Expression(key, scene.record, f"{name} on the {side}", boxes, row))
    if not found:
        raise DataError("No photograph has two objects that a name tells apart.")
    return found


def _references(rows: Any, place: Path) -> list[dict[str, Any]]:
    needed = {"ann_id", "image_id", "split", "sentences"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise DataError(f"{place}: expected a list of objects with {', '.join(sorted(needed))}.")
    return rows


def _number(name: str) -> int:
    """COCO's id: the last digits of a file's name."""
    digits = "".join(character for character in Path(name).stem.rpartition("_")[2] if character.isdigit())
    return int(digits or -1)
