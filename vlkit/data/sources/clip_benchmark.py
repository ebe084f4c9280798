"""The caption files that CLIP_benchmark downloads: COCO and Flickr in Karpathy's split, one file a split.

`coco_test_karpathy.json` is in COCO's format; `flickr30k_test_karpathy.txt` has a header line and `name.jpg,caption`,
without quotes, so a caption may hold commas. Its tar layout (`wds`) is of format `webdataset`.
"""

import re
from pathlib import Path

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, read_lines
from vlkit.data.sources.coco import ANNOTATION_FOLDERS, annotated_images
from vlkit.data.sources.options import SourceOptions
from vlkit.data.sources.split_files import read_split_files

_NAME = re.compile(r"(coco)_(train|val|test)_karpathy\.json|(flickr(?:8k|30k))_(train|val|test)_karpathy\.txt")

LAYOUT = Layout(
    "clip_benchmark",
    """\
  coco/coco_test_karpathy.json             coco/val2014/COCO_val2014_000000391895.jpg  (or the other three folders)
  flickr30k/flickr30k_test_karpathy.txt    flickr30k/Images/1007129816.jpg  (or flickr30k-images/, ...)
""",
)


def read_clip_benchmark(path: Path, options: SourceOptions) -> Source:
    """Read CLIP_benchmark's caption files.

    Args:
        path: a file, or the folder that holds those of one data set.
        options: `images` (folder of the images), `split` (`train`, `val`, `test`).

    Returns:
        Records in file order, all captions of an image in one; the key is the file name.

    Raises:
        DataError: no such file, those of several data sets, no such split, no image found.
    """
    options.check_used("clip_benchmark", ["images", "split"])
    files = [path] if path.is_file() else caption_files(path)
    if not files:
        raise LAYOUT.error(f"No *_karpathy.json or *_karpathy.txt in {path}.")
    return read_split_files(
        files,
        path,
        options,
        LAYOUT,
        split_of=_split_of,
        images_of=_images,
        annotation_folders=ANNOTATION_FOLDERS,
    )


def caption_files(folder: Path) -> list[Path]:
    """CLIP_benchmark's caption files that lie directly in a folder."""
    return sorted(file for file in folder.glob("*_karpathy.*") if is_caption_file(file))


def is_caption_file(file: Path) -> bool:
    """Whether a file bears one of CLIP_benchmark's names."""
    return _NAME.fullmatch(file.name) is not None


def _split_of(file: Path) -> str | None:
    match = _NAME.fullmatch(file.name)
    return (match[2] or match[4]) if match else None


def _images(file: Path, problems: Problems) -> list[Annotated]:
    images = annotated_images(file, problems) if file.suffix == ".json" else _flickr_images(file, problems)
    for image in images:
        image.split = _split_of(file)
    return images


def _flickr_images(file: Path, problems: Problems) -> list[Annotated]:
    lines = read_lines(file)
    if ".jpg," in lines[0]:
        raise LAYOUT.error(
            f"{file} has no header line: its first line names an image already. Put 'image,caption' above."
        )
    images: dict[str, Annotated] = {}
    for number, line in enumerate(lines[1:], start=2):
        stem, found, caption = line.strip().partition(".jpg,")
        if found and caption.strip():
            images.setdefault(f"{stem}.jpg", Annotated(f"{stem}.jpg")).captions.append(caption.strip())
        elif line.strip():
            problems.add("line that is not 'name.jpg,caption'", f"{file.name}:{number}")
    return list(images.values())
