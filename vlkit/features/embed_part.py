"""One part of a set of features: encode what is new, copy what is not, write it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlkit.contracts import Progress
from vlkit.data.records import Record
from vlkit.errors import ModelError
from vlkit.features.feature_set import Fingerprint, check_finite
from vlkit.features.old_parts import OldParts, open_old_parts
from vlkit.features.source import FeatureSource, open_source
from vlkit.features.stamps import Stamp
from vlkit.features.store import SCHEMA, Part, write_part
from vlkit.features.views import NUM_VIEWS, Recipe, embed_views
from vlkit.models.embedder import Embedder

_TYPES = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True)
class Job:
    """Everything one part needs, ready to be sent to another process."""

    target: Path
    number: int
    num_parts: int
    records: tuple[Record, ...]
    stamps: tuple[Stamp, ...]
    fingerprint: Fingerprint
    model: str
    old: Path | None  # set of features to copy from
    precision: str
    grid: tuple[int, int] | None  # of patches, None for none
    views: Recipe | None  # further views of each image
    with_texts: bool
    batch_size: int
    workers: int | None


class JobResult(NamedTuple):
    """What one part came to."""

    num_embedded: int
    num_copied: int
    failures: tuple[tuple[str, str], ...]


class _Encoded(NamedTuple):
    """Some images of a part."""

    rows: list[int]
    unit: Tensor  # (b,D)
    norms: Tensor  # (b,)
    patches: Tensor | None  # (b,P,D)
    views: Tensor | None  # (b,V,D)
    failures: list[tuple[int, str]]


def do_job(job: Job, model: FeatureSource, old: OldParts | None, progress: Progress | None = None) -> JobResult:
    """Make and write one part.

    Raises:
        GalleryError: the model gives features that are not finite.
        ModelError: the model has no patches in the joint space.
    """
    rows: dict[int, _Row] = {}
    if old is not None:
        for position, (record, stamp) in enumerate(zip(job.records, job.stamps, strict=True)):
            found = old.unchanged(record.key, stamp)
            if found is not None:
                patches = old.matrix("patch_emb", found.part)[found.row] if job.grid else None
                views = old.matrix("view_emb", found.part)[found.row] if job.views else None
                rows[position] = _Row(old.matrix("img_emb", found.part)[found.row], found.norm, patches, views)
    num_copied = len(rows)
    new = [position for position in range(len(job.records)) if position not in rows]
    failures: list[tuple[int, str]] = []
    for chunk in _encode(job, [job.records[position] for position in new], model) if new else ():
        check_finite(chunk.unit, [job.records[new[row]].key for row in chunk.rows], "images")
        for place, row in enumerate(chunk.rows):
            patches = None if chunk.patches is None else chunk.patches[place].numpy()
            views = None if chunk.views is None else chunk.views[place].numpy()
            rows[new[row]] = _Row(chunk.unit[place].numpy(), float(chunk.norms[place]), patches, views)
        failures += [(new[row], reason) for row, reason in chunk.failures]
        if progress:
            progress(len(rows) + len(failures), len(job.records))
    named = tuple((job.records[position].key, reason) for position, reason in failures)
    write_part(job.target, job.number, job.num_parts, _assemble(job, rows, named, model, old))
    return JobResult(len(rows) - num_copied, num_copied, named)


def run_job(job: Job) -> JobResult:
    """`do_job` in a process that has nothing but the job: loads the model by its name, once a process."""
    model = _model(job.model)
    job.fingerprint.require_same(model.card.fingerprint, "The features begun", "the model found by this worker")
    return do_job(job, model, None if job.old is None else _old(job.old))


class _Row(NamedTuple):
    """Features of one image."""

    unit: NDArray[Any]  # (D,)
    norm: float
    patches: NDArray[Any] | None  # (P,D)
    views: NDArray[Any] | None  # (V,D)


def _assemble(
    job: Job,
    rows: dict[int, _Row],
    failures: Sequence[tuple[str, str]],
    model: FeatureSource,
    old: OldParts | None,
) -> Part:
    kind, width = _TYPES[job.precision], model.card.embed_dim
    order = sorted(rows)
    records = [job.records[position] for position in order]
    image = np.stack([rows[position].unit for position in order]) if order else np.empty((0, width))
    patches = views = None
    if job.grid is not None:
        shape = (0, job.grid[0] * job.grid[1], width)
        patches = np.stack([_must(rows[position].patches) for position in order]) if order else np.empty(shape)
        patches = patches.astype(kind, copy=False)
    if job.views is not None:
        shape = (0, NUM_VIEWS[job.views], width)
        views = np.stack([_must(rows[position].views) for position in order]) if order else np.empty(shape)
        views = views.astype(kind, copy=False)
    first, others = _texts(records, model, old, job.batch_size) if job.with_texts else (None, None)
    return Part(
        image=image.astype(kind, copy=False),
        text=None if first is None else first.astype(kind, copy=False),
        more_text=None if others is None else others.astype(kind, copy=False),
        patches=patches,
        views=views,
        metadata=_metadata(records, [job.stamps[position] for position in order], [rows[p].norm for p in order]),
        failures=failures,
    )


def _texts(
    records: Sequence[Record], model: FeatureSource, old: OldParts | None, batch_size: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n,D) of first captions, zeros where there is none, and (m,D) of the others."""
    distinct = dict.fromkeys(caption for record in records for caption in record.captions)
    new = [text for text in distinct if old is None or text not in old.texts]
    found: dict[str, NDArray[Any]] = {}
    if new:
        features = model.embedder.embed_texts(new, max(batch_size, 256))
        check_finite(features, new, "texts")
        found = dict(zip(new, features.numpy(), strict=True))
    if old is not None:
        found.update((text, old.text(text)) for text in distinct if text not in found)
    nothing = np.zeros(model.card.embed_dim, np.float32)
    first = [found[record.captions[0]] if record.captions else nothing for record in records]
    others = [found[caption] for record in records for caption in record.captions[1:]]
    empty = np.empty((0, model.card.embed_dim), np.float32)
    return (np.stack(first) if first else empty), (np.stack(others) if others else empty)


def _metadata(records: Sequence[Record], stamps: Sequence[Stamp], norms: Sequence[float]) -> pa.Table:
    columns = {
        "key": [record.key for record in records],
        "image_path": [stamp.path for stamp in stamps],
        "caption": [record.captions[0] if record.captions else None for record in records],
        "captions": [list(record.captions) for record in records],
        "label": [record.label for record in records],
        "split": [record.split for record in records],
        "norm": list(norms),
        **{name: [getattr(stamp, name) for stamp in stamps] for name in Stamp._fields[1:]},
    }
    return pa.table(columns, schema=SCHEMA)


def _encode(job: Job, records: Sequence[Record], model: FeatureSource) -> Iterator[_Encoded]:
    chunks = _encode_once(job, records, model.embedder)
    if job.views is None:
        yield from chunks
        return
    for chunk in chunks:
        readable = [records[row] for row in chunk.rows]
        views = embed_views(model.embedder, readable, job.views, job.batch_size, job.workers)
        yield chunk._replace(views=views)


def _encode_once(job: Job, records: Sequence[Record], embedder: Embedder) -> Iterator[_Encoded]:
    if job.grid is not None:
        yield from _encode_with_patches(embedder, records, job.batch_size, job.workers)
        return
    for chunk in embedder.iterate_embeddings(records, job.batch_size, workers=job.workers):
        yield _Encoded(chunk.rows, chunk.embeddings, chunk.norms, None, None, chunk.failures)


def _encode_with_patches(
    embedder: Embedder, records: Sequence[Record], batch_size: int, workers: int | None
) -> Iterator[_Encoded]:
    """Pooled features and patches of one pass through the tower."""
    tower = embedder.encoder.vision_tower
    if tower.project is None:
        raise ModelError(
            f"{embedder.name} normalises after pooling, so its patches have no place in the joint space. Leave "
            "--patches out, or take a model that normalises before pooling (any CLIP ViT)."
        )
    for chunk in embedder.iterate_pixels(records, batch_size, workers):
        raw = torch.empty(0, embedder.embed_dim)
        patches = torch.empty(0, tower.grid[0] * tower.grid[1], embedder.embed_dim)
        if chunk.rows:
            with torch.inference_mode():
                x = tower.through_blocks(chunk.images.to(embedder.device))
                raw = tower.finish(x).float().cpu()
                patches = F.normalize(tower.project(tower.patches(x)).float(), dim=-1).cpu()
        with torch.inference_mode():
            unit, norms = F.normalize(raw, dim=-1), raw.norm(dim=-1)
        yield _Encoded(chunk.rows, unit, norms, patches, None, chunk.failures)


def _must(value: NDArray[Any] | None) -> NDArray[Any]:
    assert value is not None
    return value


@cache
def _model(name: str) -> FeatureSource:
    return open_source(name)


@cache
def _old(folder: Path) -> OldParts:
    return open_old_parts(folder)
