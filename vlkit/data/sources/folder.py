"""Image folders: flat, or one folder per class, or class folders below `train`, `val`, `test`.

The label is the position of the top folder in the sorted list of class folders, as in torchvision's
ImageFolder. Images beside class folders, and all images of a flat folder, have no label.
"""

from pathlib import Path

from vlkit.data.records import ImageRef, Problems, Record, Source
from vlkit.data.sources.annotated import Layout
from vlkit.data.sources.image_files import FoundImage, is_image_name, printable_name, scan_images
from vlkit.data.sources.options import STANDARD_SPLITS, SourceOptions, canonical_split, require_split
from vlkit.errors import DataError

LAYOUT = Layout(
    "folder",
    """\
  FOLDER/*.jpg                         images without labels, or
  FOLDER/CLASS/**/*.{jpg,png,webp,...} one folder per class, or
  FOLDER/{train,val,test}/CLASS/**/*   one folder per split, with class folders
""",
)


def read_folder(path: Path, options: SourceOptions) -> Source:
    """Read an image folder, or a single image file.

    Args:
        path: the folder, or one image file.
        options: `split` picks the images below the folder of that name.

    Returns:
        Records in the order of their path; the key is the path below `path` with `/`.
        `problems` counts what was skipped: hidden entries, other files, class folders without images.

    Raises:
        DataError: no such folder, no image in it, or no such split.
    """
    options.check_used("folder", ["split"])
    if path.is_file() and is_image_name(path.name):
        return Source((Record(printable_name(path.name), ImageRef(path=str(path))),), "folder", path.parent)
    if not path.is_dir():
        raise DataError(f"{path} is no folder. Name a folder of images.")
    problems = Problems()
    found = scan_images(path, problems)
    if not found:
        skipped = f" ({'; '.join(problems.lines())})" if problems.total else ""
        raise LAYOUT.error(f"No images in {path}{skipped}.")
    return _labelled(path, found, options.split, problems)


def _labelled(path: Path, found: list[FoundImage], split: str | None, problems: Problems) -> Source:
    split_folders = _split_folders(found, split)
    wanted = require_split(split, {canonical_split(name) for name in split_folders}, path)
    class_of = [_class_name(parts, split_folders) for parts, _ in found]
    class_names = sorted({name for name in class_of if name is not None})
    label_of = {name: label for label, name in enumerate(class_names)}
    records = []
    for (parts, file), class_name in zip(found, class_of, strict=True):
        image_split = canonical_split(parts[0]) if len(parts) > 1 and parts[0] in split_folders else None
        if wanted is None or image_split == wanted:
            label = None if class_name is None else label_of[class_name]
            key = printable_name("/".join(parts))
            records.append(Record(key, ImageRef(path=file), label=label, split=image_split))
    _count_empty_classes(path, split_folders, set(class_names), problems)
    printable = tuple(printable_name(name) for name in class_names)
    return Source(tuple(records), "folder", path, printable, problems)


def _split_folders(found: list[FoundImage], split: str | None) -> set[str]:
    """The top folders that are splits: all of them are named so, or the user asks for a split that one is."""
    top = {parts[0] for parts, _ in found if len(parts) > 1}
    named = {name for name in top if canonical_split(name) in STANDARD_SPLITS}
    only_splits = named == top and all(len(parts) > 1 for parts, _ in found)
    asked = split is not None and canonical_split(split) in {canonical_split(name) for name in named}
    return named if only_splits or asked else set()


def _class_name(parts: tuple[str, ...], split_folders: set[str]) -> str | None:
    if split_folders:
        return parts[1] if len(parts) > 2 and parts[0] in split_folders else None
    return parts[0] if len(parts) > 1 else None


def _count_empty_classes(path: Path, split_folders: set[str], class_names: set[str], problems: Problems) -> None:
    """An empty class folder would shift no label, as labels follow the names; still it should be known."""
    if not class_names:
        return
    for base in [path / name for name in sorted(split_folders)] or [path]:
        for entry in sorted(base.iterdir()):
            if entry.is_dir() and entry.name not in class_names and not entry.name.startswith("."):
                problems.add("folder without images", printable_name(entry.relative_to(path).as_posix()))
