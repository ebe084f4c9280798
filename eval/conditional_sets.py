"""Queries of a reference and a condition: GeneCIS's files, and a substitute made from COCO's instances."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.coco_instances import Box, Scenes
from eval.conditional_retrieval import ConditionalQuery, ConditionalSet
from eval.crops import Crop
from eval.plain_pickle import load_plain
from vlkit.data.randomness import permutation
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources.annotated import read_json
from vlkit.errors import DataError

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")


def read_genecis(folder: str | Path, images: str | Path) -> ConditionalSet:
    """GeneCIS's `focus_object.pkl`, ... or the same as `.json`: a list of {reference, condition, target, gallery}.

    An image is {"image_id", "instance_bbox": [x, y, w, h]} (attribute tasks, Visual Genome) or {"filepath"} (object
    tasks, COCO). Queries whose gallery is not of the file's commonest size are left out, as the released code does.

    Args:
        folder: of the files.
        images: folder of the photographs, searched in `val2017` and `VG_100K_all` below it too.

    Raises:
        DataError: no file, another form, a pickle that holds more than plain data, or no image found.

    Differs: the released pickles of the object tasks hold objects of another library, which would run its code: these
    are refused; write them as JSON where that library is at hand.
    """
    place, root = Path(folder), Path(images)
    queries, missing, odd = [], 0, 0
    files = [file for task in TASKS for file in (place / f"{task}.json", place / f"{task}.pkl") if file.is_file()]
    if not files:
        raise DataError(f"{place} holds none of GeneCIS's files; expected {TASKS[0]}.json or .pkl and the like.")
    folders = [one for one in (root, root / "val2017", root / "VG_100K_all") if one.is_dir()]
    for file in files:
        rows = _entries(file)
        usual = Counter(len(row["gallery"]) for row in rows).most_common(1)[0][0]
        for number, row in enumerate(rows):
            if len(row["gallery"]) != usual:
                odd += 1
                continue
            crops = [_crop(one, folders, file, number) for one in (row["reference"], row["target"], *row["gallery"])]
            found = [crop for crop in crops if crop is not None]
            if len(found) < len(crops):
                missing += 1
                continue
            condition, key = str(row["condition"]), f"{file.stem}/{number}"
            queries.append(ConditionalQuery(key, found[0], condition, found[1], tuple(found[2:]), file.stem))
    if not queries:
        raise DataError(f"None of the images of {place} was found in {root} ({missing} queries).")
    left = (("queries_without_image", missing), ("queries_of_unusual_size", odd))
    return ConditionalSet(tuple(queries), "GeneCIS", left)


def object_conditions(scenes: Scenes, num_distractors: int = 14, seed: int = 0) -> ConditionalSet:
    """A substitute for the object tasks, built from instances.

    focus_object: reference and target share the condition's category; half of the distractors share another category
    of the reference, the others neither. change_object: the target shows a category of the reference, and the
    condition's, which the reference lacks; half of the distractors show the condition's category only, the others
    a category of the reference only.

    Args:
        scenes: photographs with objects.
        num_distractors: of each query; the benchmark's 14.
        seed: of what is drawn.

    Raises:
        DataError: too few photographs.

    Differs: the benchmark chooses conditions by object statistics that were not published with it; here each
    photograph gives at most one query a task, drawn by the seed.
    """
    shown = [frozenset(one.category for one in scene.instances) for scene in scenes.images]
    queries: list[ConditionalQuery] = []
    half = num_distractors // 2
    for row, own in enumerate(shown):
        others = [n for n in _drawn(len(shown), seed, row) if n != row]
        for task in ("focus_object", "change_object"):
            found = _object_query(task, row, own, others, shown, half, num_distractors - half, seed)
            if found is None:
                continue
            category, target, distractors = found
            crops = [Crop(scenes.images[n].record) for n in (row, target, *distractors)]
            key = f"{task}/{scenes.images[row].record.key}"
            queries.append(ConditionalQuery(key, crops[0], scenes.names[category], crops[1], tuple(crops[2:]), task))
    if not queries:
        raise DataError(f"{len(shown)} photographs give no query with {num_distractors} distractors; give more.")
    left = ("photographs_without_query", 2 * len(shown) - len(queries))
    return ConditionalSet(tuple(queries), f"substitute: COCO instances, {num_distractors} distractors", (left,))


def _object_query(
    task: str,
    row: int,
    own: frozenset[int],
    others: Sequence[int],
    shown: Sequence[frozenset[int]],
    num_near: int,
    num_far: int,
    seed: int,
) -> tuple[int, int, list[int]] | None:
    """Category, target and distractors of one photograph's query; None where there are too few."""
    everything = sorted(frozenset().union(*shown))
    wanted = sorted(own) if task == "focus_object" else [one for one in everything if one not in own]
    for place in _drawn(len(wanted), seed, row + len(shown)):
        category, rest = wanted[place], own - {wanted[place]}
        by_kind: dict[str, list[int]] = defaultdict(list)
        for other in others:
            has, shares = category in shown[other], bool(rest & shown[other])
            by_kind["both" if has and shares else "has" if has else "shares" if shares else "neither"].append(other)
        if task == "focus_object":
            targets, near, far = [*by_kind["has"], *by_kind["both"]], by_kind["shares"], by_kind["neither"]
        else:
            targets, near, far = by_kind["both"], by_kind["has"], by_kind["shares"]
        if targets and len(near) >= num_near and len(far) >= num_far:
            return category, targets[0], [*near[:num_near], *far[:num_far]]
    return None


def _drawn(size: int, seed: int, row: int) -> list[int]:
    order: list[int] = permutation(seed, 0, row, "conditional retrieval", size).tolist()
    return order


def _entries(file: Path) -> list[dict[str, Any]]:
    rows = read_json(file) if file.suffix == ".json" else load_plain(file)
    needed = {"reference", "condition", "target", "gallery"}
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and needed <= row.keys() for row in rows)
    ):
        raise DataError(f"{file}: expected a list of objects with {', '.join(sorted(needed))}.")
    return rows


def _crop(entry: Any, folders: Sequence[Path], file: Path, number: int) -> Crop | None:
    if not isinstance(entry, dict) or not ({"filepath", "image_id"} & entry.keys()):
        raise DataError(f"{file}, entry {number}: an image has neither `filepath` nor `image_id`.")
    name = Path(str(entry["filepath"])).name if "filepath" in entry else f"{entry['image_id']}.jpg"
    path = next((one / name for one in folders if (one / name).is_file()), None)
    if path is None:
        return None
    box = entry.get("instance_bbox")
    return Crop(Record(name, ImageRef(path=str(path))), None if box is None else Box(*(float(side) for side in box)))
