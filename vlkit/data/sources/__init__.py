"""Sources: every on-disk format of image-text data, read into the same records.

| name           | file                | reads                                                            |
|----------------|---------------------|------------------------------------------------------------------|
| folder         | `folder.py`         | images, flat or in class folders, with or without train/val/test |
| caption_files  | `caption_files.py`  | images with `.txt` or `.json` beside them (img2dataset `files`)  |
| table          | `table.py`          | CSV, TSV, JSON lines, JSON list, parquet: image paths, captions  |
| parquet        | `parquet.py`        | parquet with the images in it: img2dataset, the Hub              |
| coco           | `coco.py`           | `captions_{train,val}{2014,2017}.json`                           |
| karpathy       | `karpathy.py`       | `dataset_{coco,flickr30k,flickr8k}.json`                         |
| lavis          | `lavis.py`          | `coco_karpathy_test.json`, `flickr30k_test.json` (ALBEF, BLIP)   |
| clip_benchmark | `clip_benchmark.py` | `coco_test_karpathy.json`, `flickr30k_test_karpathy.txt`         |
| coop           | `coop.py`           | `split_zhou_*.json` of CoOp's data sets                          |
| flickr8k       | `flickr.py`         | `Flickr8k.token.txt` with split lists; Kaggle's `captions.txt`   |
| flickr30k      | `flickr.py`         | `results_20130124.token` or `results.csv`, with or without split |
| webdataset     | `webdataset.py`     | tar shards, also in CLIP_benchmark's `wds` layout                |
"""

from collections.abc import Callable
from pathlib import Path

from vlkit.data.records import Source
from vlkit.data.sources.caption_files import read_caption_files
from vlkit.data.sources.clip_benchmark import read_clip_benchmark
from vlkit.data.sources.coco import read_coco
from vlkit.data.sources.coop import read_coop
from vlkit.data.sources.flickr import read_flickr8k, read_flickr30k
from vlkit.data.sources.folder import read_folder
from vlkit.data.sources.karpathy import read_karpathy
from vlkit.data.sources.lavis import read_lavis
from vlkit.data.sources.options import SourceOptions
from vlkit.data.sources.parquet import read_parquet
from vlkit.data.sources.sniff import guess_format
from vlkit.data.sources.table import read_table
from vlkit.data.sources.webdataset import is_shard_spec, read_webdataset
from vlkit.errors import ConfigError, DataError, did_you_mean

__all__ = ["FORMATS", "SourceOptions", "read_source"]

Reader = Callable[[Path, SourceOptions], Source]

FORMATS: dict[str, Reader] = {
    "folder": read_folder,
    "caption_files": read_caption_files,
    "table": read_table,
    "parquet": read_parquet,
    "coco": read_coco,
    "karpathy": read_karpathy,
    "lavis": read_lavis,
    "clip_benchmark": read_clip_benchmark,
    "coop": read_coop,
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "webdataset": read_webdataset,
}


def read_source(
    path: str | Path,
    *,
    format: str | None = None,  # noqa: A002  (the name of the option; no one formats strings here)
    images: str | Path | None = None,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    class_column: str | None = None,
) -> Source:
    """Read image-text data of any known format.

    Args:
        path: the folder of the data set, its annotation file, or shards (tar, folder, glob, braces, `a::b`).
        format: a name of `FORMATS`; None guesses it from what lies on disk.
        images: folder of the image files where it is not the customary one.
        split: `train`, `val` (also `dev`, `validation`) or `test`; None reads all.
        image_column: column of a table with the image paths.
        caption_column: column of a table with the captions.
        class_column: column of a table with the classes.

    Returns:
        The records in a fixed order; `format` tells the guess, `problems` what was left out and why.

    Raises:
        DataError: nothing there, ambiguous, no such split, or nothing usable (with the expected tree).
        ConfigError: unknown format, or an option that the format has no use for.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"Unknown source format '{format}'. {did_you_mean(format, FORMATS)}")
    place = Path(path)
    options = SourceOptions(None if images is None else Path(images), split, image_column, caption_column, class_column)
    if not place.exists() and not is_shard_spec(place):
        near = did_you_mean(place.name, _neighbours(place)) if place.parent.is_dir() else ""
        raise DataError(
            f"{place} does not exist. Name a folder of images, a table, an annotation file or shards. {near}".rstrip()
        )
    return FORMATS[format or guess_format(place, options)](place, options)


def _neighbours(place: Path) -> list[str]:
    return sorted(entry.name for entry in place.parent.iterdir())
