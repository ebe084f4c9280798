"""Features on disk, in clip-retrieval's layout with a fingerprint beside it.

    fingerprint.json                        model, precision, what was embedded
    img_emb/img_emb_0.npy               (n,D) float16 or float32, unit norm, one row an image
    text_emb/text_emb_0.npy             (n,D) its first caption; zeros where it has none
    more_text_emb/more_text_emb_0.npy   (m,D) its other captions, in order
    patch_emb/patch_emb_0.npy           (n,P,D) unit norm in the joint space
    view_emb/view_emb_0.npy             (n,V,D) unit norm, views for test-time augmentation
    metadata/metadata_0.parquet         row i: key, image_path, caption, captions, label, norm, ...
    failures/failures_0.jsonl           images that could not be read

Row i of each file of a part is about the same image. The metadata are written last: a part that has them is whole.
Parts are numbered as clip-retrieval numbers them: with as many digits as the number of parts has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError, GalleryError
from vlkit.features.clip_retrieval import StoredEmbeddings, read_clip_retrieval
from vlkit.features.feature_set import FeatureSet, Fingerprint
from vlkit.features.stage import COMPLETE, STAGE
from vlkit.features.views import Recipe

ABOUT = "fingerprint.json"
FOLDERS = ("img_emb", "text_emb", "more_text_emb", "patch_emb", "view_emb", "metadata", "failures")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_path", pa.string()),
        ("caption", pa.string()),  # the first one, as clip-retrieval has it
        ("captions", pa.list_(pa.string())),
        ("label", pa.int64()),
        ("split", pa.string()),
        ("norm", pa.float32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("column", pa.string()),
        ("file_size", pa.int64()),
        ("changed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class About:
    """What `fingerprint.json` says."""

    fingerprint: Fingerprint
    precision: str  # "fp16" or "fp32"
    num_parts: int
    part_size: int  # images a part, unreadable ones included
    plan: str  # hash of all images, captions and labels in their order
    num_images: int  # unreadable ones included
    source: Mapping[str, Any]  # path, format, split, class_names
    grid: tuple[int, int] | None = None  # of the patches
    views: Recipe | None = None  # which views of each image are stored

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "fingerprint"}
        # Captions are embedded as they are: the one template of a set of features.
        return {**self.fingerprint.to_json(), "templates": ["{}"], **fields}


class Part(NamedTuple):
    """One part in memory; n readable images, m captions beyond the first of each."""

    image: NDArray[Any]  # (n,D)
    text: NDArray[Any] | None  # (n,D)
    more_text: NDArray[Any] | None  # (m,D)
    patches: NDArray[Any] | None  # (n,P,D)
    views: NDArray[Any] | None  # (n,V,D)
    metadata: pa.Table  # (n) rows of SCHEMA
    failures: Sequence[tuple[str, str]]  # key, what is wrong


@dataclass(frozen=True)
class StoredFeatures:
    """A finished folder of features, memory-mapped."""

    folder: Path
    about: About
    stored: StoredEmbeddings

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the model."""
        return self.about.fingerprint

    @cached_property
    def metadata(self) -> pa.Table:
        """One row an image, columns of SCHEMA."""
        return self.stored.metadata(SCHEMA.names)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Key of each image."""
        return tuple(self.metadata.column("key").to_pylist())

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """Captions of each image."""
        return tuple(tuple(captions or ()) for captions in self.metadata.column("captions").to_pylist())

    @cached_property
    def failures(self) -> dict[str, str]:
        """Key and reason of each image that could not be read."""
        files = sorted((self.folder / "failures").glob("*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
        return {line["key"]: line["reason"] for line in lines}

    def images(self, patches: bool = False, views: bool = False) -> FeatureSet:
        """Features of all images, in memory; patches and views of a set in one part stay on disk.

        Raises:
            GalleryError: patches or views are asked for, but were not embedded.
        """
        if views and self.about.views is None:
            raise GalleryError(f"{self.folder} holds no views. Embed again with --views flip or ten-crop.")
        if patches and self.about.grid is None:
            raise GalleryError(f"{self.folder} holds no patches. Embed again with --patches.")
        labels = self.metadata.column("label").fill_null(-1).to_numpy()
        return FeatureSet(
            pooled=F.normalize(torch.from_numpy(self.stored.rows("image", 0, len(self.stored))), dim=-1),
            norm=torch.from_numpy(self.metadata.column("norm").to_numpy().copy()),
            ids=self.ids,
            fingerprint=self.fingerprint,
            patches=torch.from_numpy(self._joined("patch_emb")) if patches else None,
            grid=self.about.grid if patches else None,
            views=torch.from_numpy(self._joined("view_emb")) if views else None,
            labels=torch.from_numpy(labels.copy()) if bool((labels >= 0).any()) else None,
        )

    def texts(self) -> FeatureSet:
        """Features of all captions, in memory; ids are KEY#0, KEY#1, ...

        Raises:
            GalleryError: no image has a caption.
        """
        if "text" not in self.stored.kinds:
            raise GalleryError(f"{self.folder} holds no captions: none of its images has one.")
        counts = np.array([len(captions) for captions in self.captions])
        owners = np.repeat(np.arange(len(counts)), counts)
        first = np.zeros(len(owners), bool)
        first[(np.cumsum(counts) - counts)[counts > 0]] = True
        features = np.empty((len(owners), self.stored.dim), np.float32)
        features[first] = self.stored.rows("text", 0, len(self.stored))[counts > 0]
        if not first.all():
            features[~first] = self._joined("more_text_emb")
        return FeatureSet(
            pooled=F.normalize(torch.from_numpy(features), dim=-1),
            norm=None,
            ids=tuple(f"{key}#{k}" for key, count in zip(self.ids, counts, strict=True) for k in range(count)),
            fingerprint=self.fingerprint,
            text_to_image=torch.from_numpy(owners),
        )

    def _joined(self, name: str) -> NDArray[Any]:
        count = self.about.num_parts
        files = [part_file(self.folder, name, part, count) for part in range(count)]
        mapped = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        # One part stays memory-mapped; torch wants an array it may write to, and "c" keeps the file as it is.
        return np.load(files[0], mmap_mode="c", allow_pickle=False) if len(files) == 1 else np.concatenate(mapped)


def open_features(folder: str | Path) -> StoredFeatures:
    """Open what `vlkit embed` wrote.

    Raises:
        GalleryError: no features there, not finished, or cut.
    """
    folder = Path(folder)
    about = read_about(folder)
    if any(folder.glob(f"{STAGE}*/{COMPLETE}")):
        raise GalleryError(f"An update of {folder} was interrupted. Run the same `vlkit embed --update` again.")
    done = sum(is_whole(folder, part, about.num_parts) for part in range(about.num_parts))
    if done < about.num_parts:
        raise GalleryError(
            f"{folder} is not finished: {done} of {about.num_parts} parts are there. Run the same `vlkit embed` "
            "command again; it continues."
        )
    try:
        return StoredFeatures(folder, about, read_clip_retrieval(folder))
    except DataError as error:
        raise GalleryError(str(error)) from error


def read_about(folder: Path) -> About:
    """What a folder of features says of itself.

    Raises:
        GalleryError: it is none, or its fingerprint is broken.
    """
    path = folder / ABOUT
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in About.__dataclass_fields__ if name not in ("fingerprint", "views")]
        # Sets that were made before there were views do not speak of them.
        fields = {name: value[name] for name in names} | {"views": value.get("views")}
    except FileNotFoundError as error:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) if folder.is_dir() else "no folder"
        raise GalleryError(
            f"{folder} holds no features: it has no {ABOUT} (found: {found or 'nothing'}). Make them with "
            f"`vlkit embed SOURCE --model NAME --out {folder}`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GalleryError(f"{path} is broken ({error!r}). Embed again into another folder.") from error
    fields["grid"] = tuple(fields["grid"]) if fields["grid"] else None
    return About(fingerprint=Fingerprint.from_json(value, path), **fields)


def write_about(folder: Path, about: About) -> None:
    """Write `fingerprint.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / ABOUT) as file:
        file.write((json.dumps(about.to_json(), indent=2) + "\n").encode())


def write_part(folder: Path, number: int, num_parts: int, part: Part) -> None:
    """Write one of a number of parts; it counts once its metadata are there, which come last."""
    matrices = {
        "img_emb": part.image,
        "text_emb": part.text,
        "more_text_emb": part.more_text,
        "patch_emb": part.patches,
        "view_emb": part.views,
    }
    for name, matrix in matrices.items():
        if matrix is not None:
            with _new_file(folder, name, number, num_parts) as file:
                np.save(file, matrix)
    if part.failures:
        lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in part.failures]
        with _new_file(folder, "failures", number, num_parts) as file:
            file.write("".join(lines).encode())
    with _new_file(folder, "metadata", number, num_parts) as file:
        pq.write_table(part.metadata, file)


def is_whole(folder: Path, number: int, num_parts: int) -> bool:
    """Whether a part was written to its end."""
    return part_file(folder, "metadata", number, num_parts).is_file()


def part_file(folder: Path, name: str, number: int, num_parts: int) -> Path:
    """Where one file of a part lies."""
    suffix = {"metadata": ".parquet", "failures": ".jsonl"}.get(name, ".npy")
    return folder / name / f"{name}_{number:0{len(str(num_parts))}d}{suffix}"


def _new_file(folder: Path, name: str, number: int, num_parts: int) -> Any:
    path = part_file(folder, name, number, num_parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_file(path)
