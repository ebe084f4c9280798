"""Flickr8k and Flickr30k: token files (`name.jpg#0<TAB>caption`), their Kaggle variants, and split lists.

Flickr8k's token file names one image that does not exist (`....jpg.1`); it is counted as missing. Flickr30k's
Kaggle `results.csv` has one row without its second pipe; it is repaired, as nothing of it is lost.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, build_source, read_lines, read_text
from vlkit.data.sources.delimited import read_delimited
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.data.sources.karpathy import FLICKR_FOLDERS, read_annotated
from vlkit.data.sources.options import SourceOptions
from vlkit.errors import DataError
from vlkit.escape import one_line

TEXT_FOLDERS = ("Flickr8k_text", "annotations")  # where the archive with the texts is customarily unpacked
FLICKR8K_FILES = ("Flickr8k.token.txt", "captions.txt")
FLICKR30K_FILES = ("results_20130124.token", "results.csv")

FLICKR8K = Layout(
    "flickr8k",
    """\
  flickr8k/Flickr8k.token.txt           (or Kaggle's captions.txt, which has no splits)
  flickr8k/Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt
  flickr8k/Flicker8k_Dataset/1000268201_693b08cb0e.jpg   (or Flickr8k_Dataset/, Images/, images/)
""",
)
FLICKR30K = Layout(
    "flickr30k",
    """\
  flickr30k/results_20130124.token      (or Kaggle's results.csv)
  flickr30k/dataset_flickr30k.json      (Karpathy split; or train.txt, val.txt, test.txt with image ids)
  flickr30k/flickr30k-images/1000092795.jpg              (or flickr30k_images/, Images/, images/)
""",
)

# Where a row stands, the image it names, its caption.
_Pair = tuple[str, str, str]


def read_flickr8k(path: Path, options: SourceOptions) -> Source:
    """Read Flickr8k from its token file and split lists, or from Kaggle's `captions.txt`.

    Args:
        path: the folder, or the caption file.
        options: `images` (folder of the images), `split` (`train`, `val` = `dev`, `test`).

    Returns:
        Records in the order of the caption file, the split from the lists (None where no list names the image).

    Raises:
        DataError: no caption file, no such split, no image found.
    """
    return _read(path, options, FLICKR8K, FLICKR8K_FILES)


def read_flickr30k(path: Path, options: SourceOptions) -> Source:
    """Read Flickr30k from its token file or Kaggle's `results.csv`.

    The split comes from `dataset_flickr30k.json` (Karpathy) or from `train.txt`, `val.txt`, `test.txt` beside
    the captions. The two differ, so both at once are an error.

    Args:
        path: the folder, or the caption file.
        options: `images` (folder of the images), `split` (`train`, `val`, `test`).

    Returns:
        Records in the order of the caption file, with their split where one names them.

    Raises:
        DataError: no caption file, two definitions of the split, no such split, no image found.
    """
    return _read(path, options, FLICKR30K, FLICKR30K_FILES)


def caption_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` in a folder or in the sub-folder the text archive is unpacked to."""
    places = (folder, *(folder / name for name in TEXT_FOLDERS))
    return next((place / name for place in places for name in names if (place / name).is_file()), None)


def _read(path: Path, options: SourceOptions, layout: Layout, names: Sequence[str]) -> Source:
    options.check_used(layout.format, ["images", "split"])
    file = path if path.is_file() else caption_file(path, names)
    if file is None:
        raise layout.error(f"No {' or '.join(names)} in {path}.")
    problems = Problems()
    splits = _flickr8k_splits(file) if layout is FLICKR8K else _flickr30k_splits(file)
    images: dict[str, Annotated] = {}
    for _, name, caption in _pairs(file, problems):
        if name not in images:
            images[name] = Annotated(name, split=splits.get(name))
        images[name].captions.append(caption)
    above = file.parent.name in TEXT_FOLDERS
    lookup = ImageLookup(image_folders(file, FLICKR_FOLDERS, options.images, also_above=above))
    return build_source(images.values(), lookup, layout, file, problems, options.split)


def _pairs(file: Path, problems: Problems) -> Iterator[_Pair]:
    """The image-caption pairs of a file, whatever its variant."""
    if file.name == "captions.txt":
        pairs = _kaggle8k_pairs(file, problems)
    elif file.suffix == ".csv":
        pairs = _kaggle30k_pairs(file, problems)
    else:
        pairs = _token_pairs(file, problems)
    for where, name, caption in pairs:
        if not name:
            problems.add("row without an image name", where)
        elif not caption:
            problems.add("empty caption", where)
        else:
            yield where, name, caption


def _token_pairs(file: Path, problems: Problems) -> Iterator[_Pair]:
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        token, tab, caption = line.partition("\t")
        name, mark, place = token.rpartition("#")
        if tab and mark and place.strip().isdecimal():
            yield f"{file.name}:{number}", name.strip(), caption.strip()
        else:
            problems.add("line that is not 'name.jpg#0<TAB>caption'", f"{file.name}:{number}")


def _kaggle8k_pairs(file: Path, problems: Problems) -> Iterator[_Pair]:
    header, rows = read_delimited(read_text(file), ",", file, problems)
    if header != ["image", "caption"]:
        opening = one_line(",".join(header), 80)
        raise FLICKR8K.error(f"{file} opens with '{opening}'; Kaggle's opens with 'image,caption'.")
    for where, row in rows:
        yield where, row["image"].strip(), row["caption"].strip()


def _kaggle30k_pairs(file: Path, problems: Problems) -> Iterator[_Pair]:
    lines = read_lines(file)
    if not lines[0].startswith("image_name|"):
        expected = "image_name| comment_number| comment"
        raise FLICKR30K.error(f"{file} opens with '{one_line(lines[0], 80)}'; Kaggle's opens with '{expected}'.")
    for number, line in enumerate(lines[1:], start=2):
        # The second pipe is optional for the sake of one row: `2199200615.jpg| 4   A dog runs across the grass .`
        match = re.fullmatch(r"([^|]+)\|\s*\d+\s*(?:\||\s)\s*(.*)", line)
        if match:
            yield f"{file.name}:{number}", match[1].strip(), match[2].strip()
        elif line.strip():
            problems.add("line that is not 'name.jpg| number| caption'", f"{file.name}:{number}")


def _flickr8k_splits(file: Path) -> dict[str, str]:
    lists = {"train": "trainImages", "val": "devImages", "test": "testImages"}
    return _listed_splits({split: file.parent / f"Flickr_8k.{stem}.txt" for split, stem in lists.items()})


def _flickr30k_splits(file: Path) -> dict[str, str]:
    karpathy = file.parent / "dataset_flickr30k.json"
    listed = _listed_splits({split: file.parent / f"{split}.txt" for split in ("train", "val", "test")}, ".jpg")
    if not karpathy.is_file():
        return listed
    if listed:
        raise DataError(
            f"{file.parent} defines the split twice: {karpathy.name} (Karpathy's, used by published results) and "
            "train.txt/val.txt/test.txt, which differ. Keep one of them in that folder."
        )
    return {image.name: image.split for image in read_annotated(karpathy, Problems()) if image.split}


def _listed_splits(lists: dict[str, Path], suffix: str = "") -> dict[str, str]:
    """The split of each image named in the list files that exist; `suffix` completes ids to file names."""
    split_of: dict[str, str] = {}
    for split, file in lists.items():
        for number, line in enumerate(read_lines(file) if file.is_file() else [], start=1):
            name = line.strip()
            name = name if not name or name.endswith(suffix) else name + suffix
            if name and split_of.setdefault(name, split) != split:
                raise DataError(f"{file}, line {number}: {name} is already in split '{split_of[name]}'.")
    return split_of
