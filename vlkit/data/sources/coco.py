"""COCO captions: `captions_{train,val}{2014,2017}.json` with the image folders beside the annotations.

The same photographs carry other file names in the 2014 and the 2017 release, so an image is looked up by
its id in all four folders.
"""

import re
from pathlib import Path

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, build_source, json_rows, read_json
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.data.sources.options import SourceOptions, canonical_split, require_split
from vlkit.errors import DataError

IMAGE_FOLDERS = ("val2017", "train2017", "val2014", "train2014", "images", "Images")
ANNOTATION_FOLDERS = ("annotations", "karpathy", "caption_datasets")
_CAPTIONS_NAME = re.compile(r"captions_(train|val)(2014|2017)", re.IGNORECASE)

LAYOUT = Layout(
    "coco",
    """\
  coco/annotations/captions_val2017.json     (and/or captions_train2017.json; 2014 likewise)
  coco/val2017/000000397133.jpg
  coco/train2017/000000000009.jpg
  coco/val2014/COCO_val2014_000000391895.jpg
""",
)


def read_coco(path: Path, options: SourceOptions) -> Source:
    """Read COCO captions.

    Args:
        path: an annotation file, or the folder that holds it or holds `annotations/`.
        options: `images` (folder of the images, or of `val2017/` and its like), `split` (`train` or `val`).

    Returns:
        Records in the order of the file's `images`; the key is `file_name`; captions in file order, all of them.

    Raises:
        DataError: no annotations, no such split, no image found.
    """
    options.check_used("coco", ["images", "split"])
    files = _wanted_files(path, options.split)
    problems = Problems()
    images = [image for file in files for image in annotated_images(file, problems)]
    above = files[0].parent.name in ANNOTATION_FOLDERS
    lookup = ImageLookup(image_folders(files[0], IMAGE_FOLDERS, options.images, also_above=above))
    return build_source(images, lookup, LAYOUT, files[0], problems, options.split)


def annotation_files(folder: Path) -> list[Path]:
    """The caption files of a COCO folder, or of its `annotations` folder."""
    if not folder.is_dir():
        return []
    return sorted(folder.glob("captions_*.json")) or sorted((folder / "annotations").glob("captions_*.json"))


def coco_file_names(identifier: int, stated: str) -> tuple[str, ...]:
    """The names under which COCO's image `identifier` may lie; the stated one first."""
    twelve = f"{identifier:012d}.jpg"
    return (stated, twelve, f"COCO_val2014_{twelve}", f"COCO_train2014_{twelve}")


def _wanted_files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    files = annotation_files(path)
    if not files:
        raise LAYOUT.error(f"No captions_*.json in {path} or {path / 'annotations'}.")
    splits = [_split_of(file) for file in files]
    wanted = require_split(split, splits, ", ".join(file.name for file in files)) if split else None
    files = [file for file, of in zip(files, splits, strict=True) if wanted is None or of == wanted]
    # 2014 and 2017 hold the same photographs, distributed otherwise over train and val.
    if len({_year_of(file) for file in files}) > 1:
        names = ", ".join(str(file) for file in files)
        raise DataError(f"{path} holds captions of more than one release: {names}. Name the annotation file itself.")
    return files


def _split_of(file: Path) -> str | None:
    match = _CAPTIONS_NAME.search(file.name)
    return canonical_split(match[1]) if match else None


def _year_of(file: Path) -> str | None:
    match = _CAPTIONS_NAME.search(file.name)
    return match[2] if match else None


def annotated_images(file: Path, problems: Problems) -> list[Annotated]:
    """The images of a file in COCO's format with their captions; what does not fit is counted in `problems`.

    Raises:
        DataError: unreadable, or of another structure.
    """
    document = read_json(file)
    annotations = json_rows(document, "annotations", LAYOUT, file)
    if annotations and not any("caption" in row for row in annotations):
        raise LAYOUT.error(f"The annotations of {file} hold no captions: is it an instances or keypoints file?")
    by_id: dict[int, Annotated] = {}
    for place, row in enumerate(json_rows(document, "images", LAYOUT, file)):
        identifier, name = row.get("id"), row.get("file_name")
        if not isinstance(identifier, int) or not isinstance(name, str):
            problems.add("image entry without id or file_name", f"{file.name} images[{place}]")
        elif identifier in by_id:
            problems.add("image id that stands twice", f"{file.name} images[{place}]")
        else:
            by_id[identifier] = Annotated(name, split=_split_of(file), files=coco_file_names(identifier, name))
    for place, row in enumerate(annotations):
        identifier, caption = row.get("image_id"), row.get("caption")
        image = by_id.get(identifier) if isinstance(identifier, int) else None
        if image is None:
            problems.add("caption of an image that is not listed", f"{file.name} annotations[{place}]")
        elif not isinstance(caption, str) or not caption.strip():
            problems.add("empty caption", f"{file.name} annotations[{place}]")
        else:
            image.captions.append(caption)
    return list(by_id.values())
