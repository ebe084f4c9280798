"""Images with their captions in text files beside them: `000000001.jpg`, `000000001.txt`, `000000001.json`.

img2dataset writes this as `files` (`00000/000000000.jpg`, with `00000.parquet` beside the folder); clip-retrieval and
many trainers read it.
"""

import json
import os
from pathlib import Path

from vlkit.data.records import ImageRef, Problems, Record, Source
from vlkit.data.sources.annotated import Layout, read_text
from vlkit.data.sources.image_files import is_image_name, printable_name, scan_images
from vlkit.data.sources.options import SourceOptions
from vlkit.errors import DataError

LAYOUT = Layout(
    "caption_files",
    """\
  FOLDER/000000001.jpg with FOLDER/000000001.txt (one caption a line), or .json with "caption"; in sub-folders too
""",
)

# Of other files a folder of this layout is made: no reason to mention them.
_EXPECTED = "not an image by its suffix"


def read_caption_files(path: Path, options: SourceOptions) -> Source:
    """Read images that have a caption file of their own name.

    Args:
        path: the folder; sub-folders are searched.
        options: none is of use.

    Returns:
        Records in the order of their path, which is the key. `problems` counts images without caption.

    Raises:
        DataError: no such folder, or no image with a caption.
    """
    options.check_used("caption_files", [])
    if not path.is_dir():
        raise DataError(f"{path} is no folder. Name a folder of images with caption files.")
    problems = Problems()
    found = scan_images(path, problems)
    problems.counts.pop(_EXPECTED, None)
    records = []
    for parts, file in found:
        key = printable_name("/".join(parts))
        try:
            captions = _captions(os.path.splitext(file)[0])
        except DataError as error:
            problems.add("caption file that cannot be read", f"{key} ({error})")
            continue
        if captions:
            records.append(Record(key, ImageRef(path=file), captions))
        else:
            problems.add("image without caption", key)
    if not records:
        raise LAYOUT.error(f"No image with a caption file in {path}: {'; '.join(problems.lines()) or 'no images'}.")
    return Source(tuple(records), "caption_files", path, (), problems)


def captioned_image(folder: Path) -> str | None:
    """Name of an image directly in a folder that has a caption file beside it; None if the first has none."""
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.name[0] != "."}
    first = min((name for name in names if is_image_name(name)), default=None)
    return first if first is not None and f"{os.path.splitext(first)[0]}.txt" in names else None


def img2dataset_folder(folder: Path) -> str | None:
    """Name of a sub-folder that img2dataset filled: its table or its statistics lie beside it."""
    for entry in sorted(folder.iterdir()):
        beside = (folder / f"{entry.name}.parquet", folder / f"{entry.name}_stats.json")
        if entry.name.isdecimal() and entry.is_dir() and any(file.is_file() for file in beside):
            return entry.name
    return None


def _captions(stem: str) -> tuple[str, ...]:
    text = Path(f"{stem}.txt")
    if text.is_file():
        return tuple(line.strip() for line in read_text(text).splitlines() if line.strip())
    about = Path(f"{stem}.json")
    if not about.is_file():
        return ()
    try:
        value = json.loads(read_text(about))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{about} is no JSON: {error}") from error
    caption = value.get("caption") if isinstance(value, dict) else None
    return (caption.strip(),) if isinstance(caption, str) and caption.strip() else ()
