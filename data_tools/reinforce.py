"""Store a teacher's features in shards, for distillation without the teacher (MobileCLIP's reinforced data).

    reinforce_shards("shards/", load_embedder("open_clip:ViT-L-14/openai"), Path("shards_taught/"))

Each sample of the copy has two more files, `teacher_image.npy` (1+views, E) and `teacher_text.npy` (captions, E), and
`teacher.json` beside the shards says which teacher it was. The first row is of the whole image, the others of views
that training shows the student again (`vlkit/data/replay.py`). A shard is whole or not there; an interrupted run is
continued by the same call, with the same teacher only.

Source: Vasu et al. 2024, "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training",
    arXiv:2311.17049, section 3.
Differs: one teacher in place of an ensemble; captions of other models come with the shards (`fields`); what a view
    was changed by is drawn again, not stored.
"""

import io
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.build_plan import finished_stats, hold_folder, settle_plan
from data_tools.copy_samples import BESIDE, Chosen, copy_shard, source_hash
from data_tools.write_shard import write_error
from vlkit.config import AugmentSettings
from vlkit.contracts import Progress, continued
from vlkit.data.augment import Augment, decode_views
from vlkit.data.caption_choice import CaptionChoice, check_fields
from vlkit.data.decode import open_image
from vlkit.data.records import Record
from vlkit.data.replay import Replay, image_number
from vlkit.data.shard_columns import Columns
from vlkit.data.shard_index import ShardIndex, ShardSet, ShardSpec
from vlkit.engine import default_workers
from vlkit.errors import ConfigError, DataError, ModelError
from vlkit.features.model_card import card_of
from vlkit.models.embedder import Embedder
from vlkit.training.assemble import make_augment
from vlkit.training.stored_teacher import TEACHER_IMAGE, TEACHER_TEXT, TeacherRecord, texts_of_sample

Precision = Literal["fp16", "fp32"]
_KINDS = {"fp16": np.float16, "fp32": np.float32}

# Samples whose features are made at a time: enough to sort texts by length, and progress moves.
_AT_ONCE = 1024
_MOST_THREADS = 8


@dataclass(frozen=True)
class ReinforceReport:
    """What one call did."""

    out: Path
    num_shards: int
    num_shards_kept: int  # finished by an earlier call
    num_samples: int
    num_texts: int  # whose features were stored by this call
    failures: tuple[tuple[str, str], ...]  # key and reason of images of this call that could not be read
    teacher: TeacherRecord
    tar_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        counts = {name: getattr(self, name) for name in ("num_shards", "num_shards_kept", "num_samples", "num_texts")}
        teacher = {
            "model": self.teacher.fingerprint.model,
            "identity": dict(self.teacher.fingerprint.identity),
            "embed_dim": self.teacher.embed_dim,
            "logit_scale": self.teacher.logit_scale,
            "fields": list(self.teacher.fields),
            "views": self.teacher.views,
        }
        failures = [{"key": key, "reason": reason} for key, reason in self.failures]
        return {"out": str(self.out), **counts, "tar_bytes": self.tar_bytes, "failures": failures, "teacher": teacher}


def reinforce_shards(
    spec: ShardSpec,
    teacher: Embedder,
    out: Path,
    *,
    fields: Sequence[str] = (),
    views: int = 0,
    augment: AugmentSettings | None = None,
    precision: Precision = "fp16",
    batch_size: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ReinforceReport:
    """Copy shards into the folder `out` with the teacher's features of every image and text, or continue that.

    An image that cannot be read has no features; training leaves such a sample out anyway.

    Args:
        spec: see `expand_shards`; no two shards of one name.
        teacher: image and text model, with its own preprocessing and tokenizer.
        out: a new folder, or one in which the same was begun.
        fields: of the .json files, whose texts get features too (`data.captions.fields` of a run).
        views: so many randomly changed views of each image get features too; training takes another one in each epoch.
        augment: what the views are changed by: `data.augment` of the run that will train on them.
        precision: of the numbers stored; fp16 changes a cosine by less than 0.001.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core, at most 8.
        progress: called with (samples done, all samples).

    Raises:
        ConfigError: `out` holds the shards themselves, two shards have one name, or views without `augment`.
        DataError: no shards or no such field, another teacher's work in the folder, no space left.
        ModelError: the teacher has no text tower, or gives numbers that are not finite.
    """
    shards = ShardSet.open(spec)
    _check(shards, out, teacher)
    if fields:
        check_fields(shards, CaptionChoice(fields=tuple((field, 1.0) for field in fields)))
    if (views > 0) != (augment is not None):
        raise ConfigError(f"views = {views} {'with' if augment else 'without'} data.augment: one goes with the other.")
    record = _record(teacher, fields, views, augment)
    job = _Job(teacher, tuple(fields), precision, batch_size, workers, Replay(views), make_augment(augment))
    kept, done, sizes, failures, num_texts = 0, 0, 0, list[tuple[str, str]](), 0
    with hold_folder(out):
        try:
            settle_plan(out, _plan(shards, record, precision))
            record.write(out)
            _copy_beside(shards.shards[0].path.parent, out)
            for shard in shards.shards:
                stats = finished_stats(out, shard.name)
                kept += stats is not None
                if stats is None:
                    taught = job.embed(shard, continued(progress, done, shards.num_samples))
                    stats = copy_shard(shard, out, taught.members)
                    failures += taught.failures
                    num_texts += taught.num_texts
                done += len(shard)
                sizes += stats["tar_bytes"]
                if progress:
                    progress(done, shards.num_samples)
        except OSError as error:
            raise write_error(error, out) from error
    return ReinforceReport(out, len(shards.shards), kept, shards.num_samples, num_texts, tuple(failures), record, sizes)


@dataclass(frozen=True)
class _Taught:
    """The features of one shard, as files."""

    images: Mapping[int, bytes]  # by row; unreadable ones are missing
    texts: Mapping[int, bytes]
    num_texts: int
    failures: Sequence[tuple[str, str]]

    def members(self, columns: Columns, row: int) -> dict[str, bytes]:
        image = {TEACHER_IMAGE: self.images[row]} if row in self.images else {}
        return {**image, TEACHER_TEXT: self.texts[row]}


@dataclass(frozen=True)
class _Job:
    """How features are made."""

    teacher: Embedder
    fields: tuple[str, ...]
    precision: Precision
    batch_size: int
    workers: int | None
    replay: Replay
    augment: Augment | None

    def embed(self, shard: ShardIndex, progress: Progress | None) -> _Taught:
        images: dict[int, bytes] = {}
        texts: dict[int, bytes] = {}
        failures: list[tuple[str, str]] = []
        num_texts = 0
        for start in range(0, len(shard), _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, len(shard)))
            names = [f"{shard.name}/{shard.key(row)}" for row in rows]
            of_images = self._embed_images(shard, rows, names, images)
            failures += of_images
            num_texts += self._embed_texts(shard, rows, names, texts)
            if progress:
                progress(rows.stop, len(shard))
        return _Taught(images, texts, num_texts, failures)

    def _embed_images(
        self, shard: ShardIndex, rows: range, names: list[str], into: dict[int, bytes]
    ) -> list[tuple[str, str]]:
        records = [Record(name, shard.image(row)) for name, row in zip(names, rows, strict=True)]
        found = self.teacher.embed_images_where_readable(records, self.batch_size, workers=self.workers)
        kept = [names[place] for place in found.kept]
        features = self._stored(found.embeddings.numpy(), kept, "image")[:, None]
        if self.augment is not None and kept:
            of_views = self._embed_views([shard.image_bytes(rows[place]) for place in found.kept], kept)
            features = np.concatenate([features, of_views], axis=1)
        into |= {rows[place]: _npy(row) for place, row in zip(found.kept, features, strict=True)}
        return [(names[place], reason) for place, reason in found.failures]

    def _embed_views(self, images: list[bytes], names: Sequence[str]) -> NDArray[Any]:
        """(n,views,E) of n encoded images that can be read."""
        count, at_once = self.replay.views, max(1, self.batch_size // self.replay.views)
        parts: list[NDArray[Any]] = []
        threads = min(default_workers(), _MOST_THREADS) if self.workers is None else max(1, self.workers)
        with ThreadPoolExecutor(threads, "views") as pool, torch.inference_mode():
            for start in range(0, len(images), at_once):
                some = slice(start, start + at_once)
                pixels = torch.cat(list(pool.map(self._views_of, images[some], names[some])))
                features = self.teacher.encoder.encode_image(pixels.to(self.teacher.device)).float().cpu().numpy()
                owners = [name for name in names[some] for _ in range(count)]
                parts.append(self._stored(features, owners, "views").reshape(-1, count, features.shape[1]))
        return np.concatenate(parts)

    def _views_of(self, data: bytes, name: str) -> Tensor:
        """(views,3,S,S) uint8, at the teacher's size."""
        assert self.augment is not None
        image, number, preprocess = open_image(data, where=name), image_number(data), self.teacher.encoder.preprocess
        choices = [self.replay.draw(self.augment, image, number, view) for view in range(self.replay.views)]
        return torch.stack(list(decode_views(image, choices, preprocess.size, preprocess.interpolation)))

    def _embed_texts(self, shard: ShardIndex, rows: range, names: list[str], into: dict[int, bytes]) -> int:
        texts = [_texts(shard, row, self.fields) for row in rows]
        owners = [name for name, own in zip(names, texts, strict=True) for _ in own]
        flat = [text for own in texts for text in own]
        features = self._stored(self.teacher.embed_texts(flat).numpy(), owners, "text")
        ends = np.cumsum([len(own) for own in texts])
        into |= {row: _npy(part) for row, part in zip(rows, np.split(features, ends[:-1]), strict=True)}
        return len(flat)

    def _stored(self, features: NDArray[np.float32], names: Sequence[str], what: str) -> NDArray[Any]:
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise ModelError(
                f"{self.teacher.name} gives numbers that are not finite for the {what} of {names[broken[0]]}. Take "
                "weights in fp32 (--teacher-precision fp32), or another teacher."
            )
        return features.astype(_KINDS[self.precision])


def _texts(shard: ShardIndex, row: int, fields: Sequence[str]) -> list[str]:
    try:
        return texts_of_sample(shard, row, fields)
    except DataError:
        return []  # its .json is broken: training leaves the sample out, and says so


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _record(teacher: Embedder, fields: Sequence[str], views: int, augment: AugmentSettings | None) -> TeacherRecord:
    drawn_by = None if augment is None else augment.model_dump(mode="json")
    numbers = teacher.embed_dim, teacher.logit_scale
    return TeacherRecord(card_of(teacher).fingerprint, *numbers, tuple(fields), views, drawn_by)


def _plan(shards: ShardSet, record: TeacherRecord, precision: Precision) -> dict[str, Any]:
    chosen = [
        Chosen(shard.path, shard.digest, np.arange(len(shard)), np.empty(0, np.uint64)) for shard in shards.shards
    ]
    return {
        "num_shards": len(shards.shards),
        "num_records": shards.num_samples,
        "source": source_hash(chosen),
        "source_format": "copy",
        "teacher": record.identity(),
        "precision": precision,
    }


def _check(shards: ShardSet, out: Path, teacher: Embedder) -> None:
    if not {"image", "text"} <= teacher.encoder.gives:
        raise ModelError(f"{teacher.name} embeds images only; a teacher gives features of images and texts.")
    if any(shard.path.parent.resolve() == out.resolve() for shard in shards.shards):
        raise ConfigError(f"{out} holds the shards to copy from. Name another folder as --out.")
    name, count = Counter(shard.name for shard in shards.shards).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"{count} of the shards are called {name}.tar; the copies keep their names. Do one folder at a time, each "
            "with an --out of its own: training takes several folders, joined by ::."
        )


def _copy_beside(folder: Path, out: Path) -> None:
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
