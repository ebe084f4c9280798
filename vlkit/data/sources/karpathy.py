"""Karpathy's split files: `dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`.

Captions are the `raw` sentences, stripped, in their case. COCO's `restval` (30,504 images of val2014 that are
in neither val nor test) counts as `train`, as in every published result.
"""

from pathlib import Path
from typing import Any

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, build_source, json_rows, read_json
from vlkit.data.sources.coco import ANNOTATION_FOLDERS, coco_file_names
from vlkit.data.sources.coco import IMAGE_FOLDERS as COCO_FOLDERS
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.data.sources.options import SourceOptions, canonical_split
from vlkit.errors import DataError

FLICKR_FOLDERS = (
    "Images",
    "images",
    "flickr30k-images",
    "flickr30k_images",
    "Flicker8k_Dataset",  # sic: the spelling of the original archive
    "Flickr8k_Dataset",
)

LAYOUT = Layout(
    "karpathy",
    """\
  coco/dataset_coco.json             coco/{train2014,val2014}/COCO_val2014_000000391895.jpg  (or the 2017 folders)
  flickr30k/dataset_flickr30k.json   flickr30k/flickr30k-images/1000092795.jpg
  flickr8k/dataset_flickr8k.json     flickr8k/Flicker8k_Dataset/1000268201_693b08cb0e.jpg  (or Images/, images/)
""",
)


def read_karpathy(path: Path, options: SourceOptions) -> Source:
    """Read a Karpathy split file and the images it names.

    Args:
        path: the JSON file, or the folder that holds exactly one `dataset_*.json`.
        options: `images` (folder of the images), `split` (`train`, `val`, `test`).

    Returns:
        Records in file order with their split; the key is `filename`.

    Raises:
        DataError: no such file, no such split, no image found.
    """
    options.check_used("karpathy", ["images", "split"])
    file = _only_file(path)
    problems = Problems()
    images = read_annotated(file, problems)
    names = (*COCO_FOLDERS, *(name for name in FLICKR_FOLDERS if name not in COCO_FOLDERS))
    above = file.parent.name in ANNOTATION_FOLDERS
    lookup = ImageLookup(image_folders(file, names, options.images, also_above=above))
    return build_source(images, lookup, LAYOUT, file, problems, options.split)


def karpathy_files(folder: Path) -> list[Path]:
    """The Karpathy files that lie directly in a folder."""
    return sorted(folder.glob("dataset_*.json"))


def read_annotated(file: Path, problems: Problems) -> list[Annotated]:
    """The images of a Karpathy file with captions and canonical split.

    Raises:
        DataError: unreadable, or of another structure.
    """
    images: dict[str, Annotated] = {}
    for place, row in enumerate(json_rows(read_json(file), "images", LAYOUT, file)):
        name, split, sentences = row.get("filename"), row.get("split"), row.get("sentences")
        if not isinstance(name, str) or not isinstance(split, str) or not isinstance(sentences, list):
            problems.add("image entry without filename, split or sentences", f"{file.name} images[{place}]")
        elif name in images:
            problems.add("file name that stands twice", f"{file.name} images[{place}]")
        else:
            captions = [row["raw"] for row in sentences if isinstance(row, dict) and isinstance(row.get("raw"), str)]
            split = "train" if canonical_split(split) == "restval" else canonical_split(split)
            images[name] = Annotated(name, captions, split, files=_files(row, name))
    return list(images.values())


def _files(row: dict[str, Any], name: str) -> tuple[str, ...]:
    identifier, folder = row.get("cocoid"), row.get("filepath")
    stated = f"{folder}/{name}" if isinstance(folder, str) and folder else name
    return (stated, *coco_file_names(identifier, name)) if isinstance(identifier, int) else (stated, name)


def _only_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = karpathy_files(path)
    if not files:
        raise LAYOUT.error(f"No dataset_*.json in {path}.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path} holds several Karpathy files: {names}. Name the file itself.")
    return files[0]
