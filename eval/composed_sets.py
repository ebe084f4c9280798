"""Queries of image and words: files of CIRR, PatternCom and domain conversion, and a substitute made from masks."""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from eval.coco_instances import Scenes
from eval.composed_retrieval import ComposedQuery, ComposedSet
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources.annotated import read_json, read_lines
from vlkit.errors import DataError

FORMS = ("cirr", "patterncom", "domains", "objects")

# What the released code of FreeDom writes for the domains of its four data sets.
DOMAIN_WORDS = {"real": "photo", "dim": "dimlight", "New": "Today", "Old": "Archive"}

_LETTERS = re.compile(r"[A-Za-z_-]+")


def read_cirr(folder: str | Path, split: str = "val", images: str | Path | None = None) -> ComposedSet:
    """CIRR: `captions/cap.rc2.SPLIT.json` and `image_splits/split.rc2.SPLIT.json`, in the folder or in its `cirr/`.

    The reference is taken out of a query's gallery. The subset is the image's set of six without the reference.

    Args:
        folder: of the data set.
        split: val or train; the answers of test1 are not published.
        images: folder that the split file's paths start from; default the data set's.

    Raises:
        DataError: a file of another form, or no image found.

    Source: Liu et al. 2021, "Image Retrieval on Real-life Images with Pre-trained Vision-and-Language Models",
    arXiv:2108.04024, and its data repository.
    """
    place = Path(folder)
    base = place / "cirr" if (place / "cirr").is_dir() else place
    rows = read_json(base / "captions" / f"cap.rc2.{split}.json")
    named = read_json(base / "image_splits" / f"split.rc2.{split}.json")
    if not isinstance(rows, list) or not isinstance(named, dict):
        raise DataError(f"{base}: expected a list of captions and an object of image paths, as CIRR publishes them.")
    root = Path(images) if images is not None else place
    gallery = {
        str(name): Record(str(name), ImageRef(path=str(root / str(path))))
        for name, path in named.items()
        if (root / str(path)).is_file()
    }
    queries, missing = [], 0
    for number, row in enumerate(rows):
        try:
            reference, target = str(row["reference"]), str(row["target_hard"])
            text, members = str(row["caption"]), [str(name) for name in row["img_set"]["members"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"CIRR's captions, entry {number}: no {error}; is this the split test1?") from error
        if not {reference, target} <= gallery.keys():
            missing += 1
            continue
        subset = tuple(name for name in members if name in gallery and name != reference)
        key = str(row.get("pairid", number))
        queries.append(ComposedQuery(key, gallery[reference], text, (target,), (reference,), subset=subset))
    return _whole(queries, list(gallery.values()), f"CIRR {split}", missing, base)


def read_patterncom(folder: str | Path, images: str | Path | None = None) -> ComposedSet:
    """PatternCom: `color.csv`, `shape.csv`, ... with rows `file,attribute,value`, and PatternNet's images.

    Every image of a file asks, with each other value its class has in this file, for images of its class with that
    value. The gallery is all of PatternNet; a file name begins with its class.

    Args:
        folder: of the CSV files, or the one that holds `PatternCom/`.
        images: PatternNet's `images/`, default beside the CSV files or above.

    Raises:
        DataError: no file, another form, or no image found.

    Source: Psomas et al. 2024, arXiv:2405.15587, and its code rscir (evaluate.py).
    Differs: classes go by the names in the files; the released code joins a few of them by a table it keeps apart.
    """
    place = Path(folder)
    tables = place / "PatternCom" if (place / "PatternCom").is_dir() else place
    files = sorted(tables.glob("*.csv"))
    if not files:
        raise DataError(f"{tables} holds no .csv file; expected PatternCom's color.csv, context.csv, ...")
    near = (tables / "images", tables.parent / "images")
    root = Path(images) if images is not None else next((one for one in near if one.is_dir()), place)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif"})
    gallery = {path.name: Record(path.name, ImageRef(path=str(path))) for path in paths}
    queries, missing = [], 0
    for file in files:
        rows = [(name, _class_of(name), value) for name, _, value in _rows(file, ",", "file,attribute,value")]
        known = [row for row in rows if row[0] in gallery]
        missing += len(rows) - len(known)
        right: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, kind, value in known:
            right[kind, value].append(name)
        for name, kind, value in known:
            for (other, wanted), names in right.items():
                if other == kind and wanted != value:
                    key = f"{file.stem}/{name}/{wanted}"
                    queries.append(ComposedQuery(key, gallery[name], wanted, tuple(names), tag=file.stem))
    return _whole(queries, list(gallery.values()), "PatternCom", missing, tables)


def read_domains(folder: str | Path, images: str | Path | None = None) -> ComposedSet:
    """Domain conversion: `query_files.csv` and `database_files.csv`, or `full_files.csv`: `path domain class` a row.

    Every query asks, with the name of each domain but its own, for images of its class in that domain.

    Args:
        folder: of the files.
        images: folder that the paths start from; default the one above, as the files' first folder is the set's name.

    Raises:
        DataError: no file, another form, or no image found.

    Source: Efthymiadis et al. 2024, arXiv:2412.03297, and its code freedom (set_dataset.py, utils_retrieval.py).
    """
    place = Path(folder)
    full = place / "full_files.csv"
    sides = (full, full) if full.is_file() else (place / "query_files.csv", place / "database_files.csv")
    root = Path(images) if images is not None else place.parent
    asked, offered = (
        [(Record(path, ImageRef(path=str(root / path))), domain, kind) for path, domain, kind in rows]
        for rows in (_rows(file, " ", "path domain class") for file in sides)
    )
    there = [row for row in offered if Path(str(row[0].image.path)).is_file()]
    right: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record, domain, kind in there:
        right[domain, kind].append(record.key)
    domains = sorted({domain for _, domain, _ in there})
    queries, missing = [], len(offered) - len(there)
    for record, domain, kind in asked:
        if not Path(str(record.image.path)).is_file():
            missing += 1
            continue
        for wanted in domains:
            if wanted != domain and right[wanted, kind]:
                word, names = DOMAIN_WORDS.get(wanted, wanted), tuple(right[wanted, kind])
                tag = f"{domain} to {wanted}"
                queries.append(ComposedQuery(f"{record.key}>{wanted}", record, word, names, tag=tag))
    return _whole(queries, [row[0] for row in there], f"domain conversion: {', '.join(domains)}", missing, place)


def add_objects(scenes: Scenes, min_right: int = 2) -> ComposedSet:
    """A substitute: an image with one kind of object asks with the name of another for images that show both.

    Args:
        scenes: photographs with objects.
        min_right: pairs of categories that fewer photographs show are left out.

    Raises:
        DataError: no pair of categories is shown so often.
    """
    shown = {scene.record.key: {one.category for one in scene.instances} for scene in scenes.images}
    queries = []
    for scene in scenes.images:
        own = shown[scene.record.key]
        # The category that fills most of the photograph stands for what it shows.
        area: dict[int, float] = defaultdict(float)
        for one in scene.instances:
            area[one.category] += one.area
        main = max(sorted(area), key=lambda category: area[category])
        for other in sorted(set(range(len(scenes.names))) - own):
            right = tuple(key for key, found in shown.items() if {main, other} <= found)
            if len(right) >= min_right:
                text, key = f"with a {scenes.names[other]}", f"{scene.record.key}+{scenes.names[other]}"
                queries.append(ComposedQuery(key, scene.record, text, right, (scene.record.key,)))
    how = f"substitute: main category and another one, {min_right} or more photographs show both"
    return _whole(queries, [scene.record for scene in scenes.images], how, 0, scenes.root)


def _whole(
    queries: Sequence[ComposedQuery], gallery: Sequence[Record], how: str, missing: int, place: Path
) -> ComposedSet:
    if not queries:
        raise DataError(f"No query of {place} has its images ({missing} rows without). Name their folder, --images.")
    return ComposedSet(tuple(queries), tuple(gallery), how, (("rows_without_image", missing),))


def _class_of(name: str) -> str:
    found = _LETTERS.match(name)
    return found[0] if found else ""


def _rows(file: Path, delimiter: str, form: str) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for number, row in enumerate(csv.reader(read_lines(file), delimiter=delimiter), start=1):
        if not row:
            continue
        if len(row) < 3:
            raise DataError(f"{file}, line {number}: {json.dumps(row)[:80]} is no `{form}`.")
        rows.append((row[0], row[1], row[2]))
    return rows
