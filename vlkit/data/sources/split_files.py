"""Caption files of COCO or Flickr in Karpathy's split, one file a split: what formats with such files share."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, build_source
from vlkit.data.sources.coco import IMAGE_FOLDERS as COCO_FOLDERS
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.data.sources.karpathy import FLICKR_FOLDERS
from vlkit.data.sources.options import SourceOptions, require_split
from vlkit.errors import DataError


def read_split_files(
    files: Sequence[Path],
    path: Path,
    options: SourceOptions,
    layout: Layout,
    *,
    split_of: Callable[[Path], str | None],
    images_of: Callable[[Path, Problems], Iterable[Annotated]],
    annotation_folders: Sequence[str],
) -> Source:
    """The records of the files of one data set that hold the wanted split.

    Args:
        files: of one folder, at least one.
        path: as the user gave it.
        options: `images` and `split` are used.
        layout: of the format.
        split_of: which split a file holds, by its name.
        images_of: the images of a file.
        annotation_folders: names of folders that lie among those of the images.

    Raises:
        DataError: files of several data sets, no such split, no image found.
    """
    if len({file.name.split("_")[0] for file in files}) > 1:
        raise DataError(f"{path} holds several data sets: {', '.join(f.name for f in files)}. Name the file itself.")
    wanted = require_split(options.split, [split_of(file) for file in files], path)
    problems = Problems()
    chosen = [file for file in files if wanted is None or split_of(file) == wanted]
    images = [image for file in chosen for image in images_of(file, problems)]
    names = (*COCO_FOLDERS, *(name for name in FLICKR_FOLDERS if name not in COCO_FOLDERS))
    above = files[0].parent.name in annotation_folders
    lookup = ImageLookup(image_folders(files[0], names, options.images, also_above=above))
    return build_source(images, lookup, layout, files[0], problems, options.split)
