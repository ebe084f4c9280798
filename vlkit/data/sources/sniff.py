"""Guesses the format of a source from what lies on disk; what could be two formats is an error, not a choice."""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from vlkit.data.sources import clip_benchmark, coop, lavis
from vlkit.data.sources.caption_files import captioned_image, img2dataset_folder
from vlkit.data.sources.coco import annotation_files
from vlkit.data.sources.delimited import DELIMITERS
from vlkit.data.sources.flickr import FLICKR8K_FILES, FLICKR30K_FILES, caption_file
from vlkit.data.sources.image_files import is_image_name
from vlkit.data.sources.karpathy import karpathy_files
from vlkit.data.sources.options import SourceOptions
from vlkit.data.sources.parquet import column_names, holds_images, parquet_files
from vlkit.data.sources.table import JSON_LINES, PARQUET, TABLE_SUFFIXES, recognised, tables_in
from vlkit.data.sources.webdataset import holds_shards, is_shard_spec
from vlkit.errors import DataError
from vlkit.escape import one_line


def guess_format(path: Path, options: SourceOptions) -> str:
    """The name of the one format that fits `path`.

    Args:
        path: a file, a folder or a shard specification.
        options: naming a column means a table.

    Raises:
        DataError: nothing there, no format fits, or more than one does; then the candidates are listed.
    """
    if is_shard_spec(path):
        return "webdataset"
    if path.is_file():
        return _guess_file(path)
    if not path.is_dir():
        raise DataError(f"{path} does not exist. Name a folder of images, a table, an annotation file or shards.")
    if any((path / name).is_dir() for name in ("img_emb", "text_emb")):
        raise DataError(f"{path} holds embeddings (clip-retrieval's layout), no images. Name it where features belong.")
    candidates = _candidates(path, options)
    if len(candidates) > 1:
        listed = "".join(f"\n  --format {name}: {evidence}" for name, evidence in candidates.items())
        raise DataError(f"{path} could be read in {len(candidates)} ways; say which by --format:{listed}")
    return next(iter(candidates), "folder")


def _guess_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.name.startswith("Flickr8k") or _is_kaggle8k(path):
        return "flickr8k"
    if suffix == ".token" or _is_kaggle30k(path):
        return "flickr30k"
    if clip_benchmark.is_caption_file(path):
        return "clip_benchmark"
    if lavis.split_in_name(path):
        return "lavis"
    if path in coop.split_files(path.parent):
        return "coop"
    if suffix == PARQUET and holds_images(path):
        return "parquet"
    if suffix in TABLE_SUFFIXES:
        return "table"
    if suffix == ".json":
        return _guess_json(path)
    if is_image_name(path.name):
        return "folder"
    raise DataError(
        f"Cannot tell the format of {path} from its name. Images, .csv, .tsv, .jsonl, .json, .parquet, .token and .tar "
        "files are known; else name the --format."
    )


def _guess_json(path: Path) -> str:
    """By content, as the names of JSON files vary; only the beginning is looked at, they can be large."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = file.read(1 << 20)
    if head.lstrip().startswith("["):
        return "table"
    if '"sentences"' in head or '"sentids"' in head:
        return "karpathy"
    if '"annotations"' in head or '"file_name"' in head or '"image_id"' in head:
        return "coco"
    raise DataError(
        f"{path} looks like neither COCO captions, nor a Karpathy split file, nor a list of objects. "
        "If it is one, name the --format."
    )


def _candidates(path: Path, options: SourceOptions) -> dict[str, str]:
    """Formats whose files lie in a folder, with the file that speaks for each."""
    found: dict[str, str] = {}
    flickr8k, flickr30k = caption_file(path, FLICKR8K_FILES), caption_file(path, FLICKR30K_FILES)
    if flickr8k and (flickr8k.name != "captions.txt" or _is_kaggle8k(flickr8k)):
        found["flickr8k"] = flickr8k.name
    if flickr30k and (flickr30k.suffix == ".token" or _is_kaggle30k(flickr30k)):
        found["flickr30k"] = flickr30k.name
    # Beside the captions of its own data set a Karpathy file is the split list, not another source.
    own = {f"dataset_{name}.json" for name in found}
    karpathy = [file.name for file in karpathy_files(path) if file.name not in own]
    if karpathy:
        found["karpathy"] = ", ".join(karpathy)
    if annotation_files(path):
        found["coco"] = ", ".join(file.name for file in annotation_files(path))
    if lavis.annotation_files(path):
        found["lavis"] = ", ".join(file.name for file in lavis.annotation_files(path))
    if clip_benchmark.caption_files(path):
        found["clip_benchmark"] = ", ".join(file.name for file in clip_benchmark.caption_files(path))
    if coop.split_files(path):
        found["coop"] = ", ".join(file.name for file in coop.split_files(path))
    if holds_shards(path):
        found["webdataset"] = "tar files"
    return found | _parquet_candidate(path) | _table_candidates(path, options, flickr30k) | _captioned(path, found)


def _parquet_candidate(path: Path) -> dict[str, str]:
    files = parquet_files(path)
    return {"parquet": f"{files[0].name} holds images"} if files and holds_images(files[0]) else {}


def _captioned(path: Path, found: dict[str, str]) -> dict[str, str]:
    """Images with caption files. In class folders they might as well be notes, so both readings are offered."""
    filled = img2dataset_folder(path)
    if filled:
        return {"caption_files": f"{filled}/ beside its table or statistics"}
    image = captioned_image(path)
    if image:
        return {"caption_files": f"{image} with a .txt beside it"}
    below = ((entry.name, captioned_image(entry)) for entry in sorted(path.iterdir()) if entry.is_dir())
    first = next(((folder, name) for folder, name in below if name), None)
    if first is None or found:
        return {}
    return {"caption_files": f"{first[0]}/{first[1]} with a .txt beside it", "folder": f"images in {first[0]}/, ..."}


def _table_candidates(path: Path, options: SourceOptions, flickr30k: Path | None) -> dict[str, str]:
    tables = [file for file in tables_in(path) if file != flickr30k or not _is_kaggle30k(file)]
    tables = [file for file in tables if file.suffix.lower() != PARQUET or not holds_images(file)]
    named = any(one is not None for one in (options.image_column, options.caption_column, options.class_column))
    sure = [file for file in tables if named or recognised(_columns(file))]
    if sure:
        return {"table": ", ".join(file.name for file in sure)}
    if tables and _holds_images(path):
        columns = "; ".join(f"{file.name} has the columns {', '.join(_columns(file))}" for file in tables)
        return {
            "table": f"{one_line(columns, 300)} (name two by --image-column, --caption-column, --class-column)",
            "folder": "images",
        }
    return {}


def _columns(file: Path) -> list[str]:
    """Column names from the first line alone; none where it cannot be parsed: the reader will say why."""
    if file.suffix.lower() == PARQUET:
        return column_names(file)
    line = _first_line(file)
    try:
        if file.suffix.lower() in JSON_LINES:
            row = json.loads(line)
            return list(row) if isinstance(row, dict) else []
        return next(csv.reader([line], delimiter=DELIMITERS[file.suffix.lower()]), [])
    except (ValueError, csv.Error):
        return []


def _first_line(file: Path) -> str:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        return lines.readline(1 << 20).rstrip("\r\n")


def _is_kaggle8k(file: Path) -> bool:
    return file.name == "captions.txt" and _first_line(file) == "image,caption"


def _is_kaggle30k(file: Path) -> bool:
    return file.suffix == ".csv" and _first_line(file).startswith("image_name|")


def _holds_images(folder: Path) -> bool:
    def names(pattern: str) -> Iterator[str]:
        return (file.name for file in folder.glob(pattern))

    return any(is_image_name(name) for name in chain(names("*"), names("*/*")))
