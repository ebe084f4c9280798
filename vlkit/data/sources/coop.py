"""CoOp's splits: `split_zhou_*.json` with train, val and test lists of (path, label, class name), images beside it.

The data sets of CoOp and of the prompt learners after it come with such a file, so results on them are comparable only
with its split.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, build_source, read_json
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.data.sources.options import SourceOptions, canonical_split
from vlkit.errors import DataError

# The folder of the images of CoOp's data sets; the paths in the file are relative to it.
IMAGE_FOLDERS = (
    "101_ObjectCategories", "images", "jpg", "2750", "UCF-101-midframes", "SUN397", "Images",
)  # fmt: skip

LAYOUT = Layout(
    "coop",
    """\
  caltech-101/split_zhou_Caltech101.json     {"train": [["accordion/image_0001.jpg", 2, "accordion"], ...], "test": ...}
  caltech-101/101_ObjectCategories/accordion/image_0001.jpg  (or images/, jpg/, 2750/, ...; else name it with --images)
""",
)


def read_coop(path: Path, options: SourceOptions) -> Source:
    """Read a split file of CoOp.

    Args:
        path: the file (of any name), or the folder that holds it.
        options: `images` (the folder its paths start from), `split`.

    Returns:
        Records of train, val and test in this order; labels as written, class names by label.

    Raises:
        DataError: no such file, another form, a label with two names, no image found.
    """
    options.check_used("coop", ["images", "split"])
    files = [path] if path.is_file() else split_files(path)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise LAYOUT.error(f"{path} should hold one split_zhou_*.json; found {found}. Name the file itself.")
    names: dict[int, str] = {}
    images = list(_images(files[0], names))
    absent = sorted(set(range(max(names, default=-1) + 1)) - set(names))
    if absent:
        raise LAYOUT.error(f"{files[0]} has no image of label {absent[0]}; labels must count from 0 without gaps.")
    lookup = ImageLookup(image_folders(files[0], IMAGE_FOLDERS, options.images))
    class_names = tuple(names[label] for label in range(len(names)))
    return build_source(images, lookup, LAYOUT, files[0], Problems(), options.split, class_names)


def split_files(folder: Path) -> list[Path]:
    """Files of this name that lie directly in a folder."""
    return sorted(folder.glob("split_zhou_*.json"))


def _images(file: Path, names: dict[int, str]) -> Iterator[Annotated]:
    document = read_json(file)
    if not isinstance(document, dict) or not {"train", "test"} <= set(document):
        raise LAYOUT.error(f"{file} is no object with lists train, val and test.")
    for split, rows in document.items():
        for place, row in enumerate(rows if isinstance(rows, list) else [rows]):
            name, label, class_name = _row(row, f"{file}, {split}[{place}]")
            if names.setdefault(label, class_name) != class_name:
                raise DataError(f"{file}, {split}[{place}]: label {label} is {class_name!r} and {names[label]!r}.")
            yield Annotated(name, split=canonical_split(split), label=label)


def _row(row: Any, where: str) -> tuple[str, int, str]:
    if isinstance(row, list) and len(row) == 3:
        name, label, class_name = row
        named = isinstance(name, str) and name.strip() and isinstance(class_name, str) and class_name.strip()
        if named and type(label) is int and 0 <= label < 1_000_000:
            return name, label, class_name.strip()
    raise LAYOUT.error(f"{where}: {str(row)[:80]} is no (path, label, class name).")
