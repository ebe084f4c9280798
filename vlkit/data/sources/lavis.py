"""The annotation files of ALBEF, BLIP and LAVIS: lists of `{image, caption}` in Karpathy's split, one file a split.

`coco_karpathy_test.json` and `flickr30k_test.json` name an image once with a list of captions, the training files
once for each caption.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, read_json
from vlkit.data.sources.coco import ANNOTATION_FOLDERS, coco_file_names
from vlkit.data.sources.options import SourceOptions
from vlkit.data.sources.split_files import read_split_files

_NAME = re.compile(r"(coco_karpathy|flickr30k)_(train|val|test)\.json")
_COCO_ID = re.compile(r"COCO_(?:train|val)2014_(\d{12})\.jpg$")

LAYOUT = Layout(
    "lavis",
    """\
  coco/coco_karpathy_test.json    coco/val2014/COCO_val2014_000000391895.jpg  (or the 2017 folders)
  flickr30k/flickr30k_test.json   flickr30k/flickr30k-images/1007129816.jpg   (or flickr30k_images/, images/)
  each a list of {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": "..." or ["...", ...]}
""",
)


def read_lavis(path: Path, options: SourceOptions) -> Source:
    """Read ALBEF-style annotations.

    Args:
        path: a file (of any name), or the folder that holds those of one data set.
        options: `images` (folder of the images), `split` (`train`, `val`, `test`, from the file's name).

    Returns:
        Records in file order, all captions of an image in one; the key is `image` as written.

    Raises:
        DataError: no such file, those of several data sets, no such split, no image found.
    """
    options.check_used("lavis", ["images", "split"])
    files = [path] if path.is_file() else annotation_files(path)
    if not files:
        raise LAYOUT.error(f"No coco_karpathy_*.json or flickr30k_*.json in {path}.")
    return read_split_files(
        files,
        path,
        options,
        LAYOUT,
        split_of=split_in_name,
        images_of=_images,
        annotation_folders=(*ANNOTATION_FOLDERS, "annotation"),
    )


def annotation_files(folder: Path) -> list[Path]:
    """Files of these names that lie directly in a folder."""
    return sorted(file for file in folder.glob("*.json") if split_in_name(file))


def split_in_name(file: Path) -> str | None:
    """The split a file of such a name holds; None for other names."""
    match = _NAME.fullmatch(file.name)
    return match[2] if match else None


def _images(file: Path, problems: Problems) -> Iterable[Annotated]:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise LAYOUT.error(f"{file} is no list of objects, but a {type(rows).__name__}.")
    images: dict[str, Annotated] = {}
    for place, row in enumerate(rows):
        name, captions = (row.get("image"), _captions(row)) if isinstance(row, dict) else (None, [])
        if not isinstance(name, str) or not name.strip():
            problems.add("row without image", f"{file.name}[{place}]")
        elif not captions:
            problems.add("row without caption", f"{file.name}[{place}]")
        else:
            image = images.setdefault(name, Annotated(name, split=split_in_name(file), files=_files(name)))
            image.captions += captions
    return images.values()


def _captions(row: dict[str, Any]) -> list[str]:
    value = row.get("caption")
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]


def _files(name: str) -> tuple[str, ...]:
    """Where the image may lie: COCO's by its number in all four folders, others also without their folder's name."""
    base = name.rpartition("/")[2]
    match = _COCO_ID.search(name)
    return (name, *coco_file_names(int(match[1]), base)) if match else (name, base)
