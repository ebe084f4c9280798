"""Embed a source once: features of its images and captions on disk, part by part.

    report = embed_source(read_source("flickr8k"), open_source("run:runs/f8k"), "features/flickr8k")
    features = open_features("features/flickr8k").images()

A part is written whole or not at all, so whatever was killed continues by running it again. Several processes share
the parts by their numbers and need nothing of each other but the folder.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from vlkit.contracts import Progress, continued
from vlkit.data.records import Record, Source
from vlkit.engine import map_parts
from vlkit.errors import ConfigError, DataError, GalleryError
from vlkit.features.embed_part import Job, JobResult, do_job, run_job
from vlkit.features.old_parts import open_old_parts
from vlkit.features.source import FeatureSource
from vlkit.features.stage import finish_move, move_in, stage_folder
from vlkit.features.stamps import Stamp, Stamper
from vlkit.features.store import ABOUT, FOLDERS, About, is_whole, read_about, write_about
from vlkit.features.views import Recipe, check_recipe

Precision = Literal["fp16", "fp32"]

_POLL = 0.2  # seconds between looks at what the other processes have finished


@dataclass(frozen=True)
class EmbedReport:
    """What one call did; with several processes, this one's share, but for `num_images`, `num_removed`, `num_parts`."""

    out: Path
    num_images: int  # in the source
    num_embedded: int
    num_copied: int  # taken from the set before the update
    num_removed: int  # of the set before the update, no longer in the source
    num_parts: int
    num_parts_kept: int  # written by an earlier call
    failures: tuple[tuple[str, str], ...]  # key and reason of images that could not be read


class _Plan(NamedTuple):
    """Where parts go, and what they may take over."""

    about: About
    target: Path
    old: Path | None
    num_removed: int


def embed_source(
    source: Source,
    model: FeatureSource,
    out: str | Path,
    *,
    precision: Precision | None = None,
    patches: bool = False,
    views: Recipe | None = None,
    part_size: int | None = None,
    update: bool = False,
    split: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> EmbedReport:
    """Embed all images and captions of a source, or continue, or bring up to date.

    Args:
        source: images with or without captions.
        model: encodes; not loaded when there is nothing to do.
        out: folder; one begun before with the same model and source is continued.
        precision: of the numbers on disk; default that of a set that is there, else fp32.
        patches: also store patch features in the joint space.
        views: also store features of further views of each image, for test-time augmentation.
        part_size: images a part; default 1024, more for large sources.
        update: where the source has changed since, embed what is new or changed and drop what is gone.
        split: what of the source this is, for the record.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core, at most 8. With ray: tasks at once.
        rank, world_size: this process takes parts rank, rank + world_size, ...; the first waits for the others.
        engine: "ray" gives each part to a task of a Ray cluster that loads the model by its name.
        progress: called with (done, total) images of this process.

    Raises:
        GalleryError: `out` holds features of another model, or other things; the model gives NaN.
        DataError: the source has changed and `update` is off; no image could be read.
        ModelError: the model has no patches to give.
        ConfigError: `part_size` below 1.
    """
    out = Path(out).absolute()  # as workers elsewhere see it
    if part_size is not None and part_size < 1:
        raise ConfigError(f"part_size is {part_size}; it must be at least 1.")
    if rank == 0:
        finish_move(out, FOLDERS, ABOUT)
    stamper = Stamper()
    stamps = [stamper.stamp(record.image) for record in source.records]
    plan = _plan(source, stamps, model, out, precision, patches, views, part_size, update, split)
    jobs = _jobs(plan, source.records, stamps, model.name, batch_size, workers)
    mine = [job for job in jobs if job.number % world_size == rank]
    missing = [job for job in mine if not is_whole(plan.target, job.number, job.num_parts)]
    results = _run(missing, plan, model, engine, workers, progress)
    if rank == 0:
        while not all(is_whole(plan.target, job.number, job.num_parts) for job in jobs):
            time.sleep(_POLL)
        if plan.target != out:
            move_in(out, plan.target, FOLDERS, ABOUT)
    report = EmbedReport(
        out=out,
        num_images=len(source.records),
        num_embedded=sum(result.num_embedded for result in results),
        num_copied=sum(result.num_copied for result in results),
        num_removed=plan.num_removed,
        num_parts=len(jobs),
        num_parts_kept=len(mine) - len(missing),
        failures=tuple(failure for result in results for failure in result.failures),
    )
    if len(report.failures) == len(source.records):
        key, reason = report.failures[0]
        raise DataError(f"None of the {len(source.records)} images could be read. First: {key}: {reason}")
    return report


def _run(
    jobs: Sequence[Job], plan: _Plan, model: FeatureSource, engine: str, workers: int | None, progress: Progress | None
) -> list[JobResult]:
    total = sum(len(job.records) for job in jobs)
    results: list[JobResult] = []
    done = 0
    if engine == "ray":
        for position, result in map_parts(run_job, jobs, workers or 0, engine="ray"):
            results.append(result)
            done += len(jobs[position].records)
            if progress:
                progress(done, total)
        return results
    old = None if plan.old is None or not jobs else open_old_parts(plan.old)
    for job in jobs:
        results.append(do_job(job, model, old, continued(progress, done, total)))
        done += len(job.records)
        if progress:
            progress(done, total)
    return results


def _plan(
    source: Source,
    stamps: Sequence[Stamp],
    model: FeatureSource,
    out: Path,
    precision: Precision | None,
    patches: bool,
    views: Recipe | None,
    part_size: int | None,
    update: bool,
    split: str | None,
) -> _Plan:
    if not source.records:
        raise DataError(f"There is no image in {source.root}.")
    existing = read_about(out) if (out / ABOUT).is_file() else None
    if existing is None:
        strange = [name for name in FOLDERS if (out / name).exists()]
        if strange:
            raise GalleryError(f"{out} holds {', '.join(strange)} without {ABOUT}: another tool's. Name another --out.")
    size = part_size or (existing.part_size if existing else max(1024, min(16_384, len(source.records) // 256)))
    wanted = About(
        fingerprint=model.card.fingerprint,
        precision=precision or (existing.precision if existing else "fp32"),
        num_parts=-(-len(source.records) // size),
        part_size=size,
        plan=_plan_hash(source.records, stamps),
        num_images=len(source.records),
        source={
            "path": str(source.root),
            "format": source.format,
            "split": split,
            "class_names": list(source.class_names),
        },
        grid=model.embedder.encoder.vision_tower.grid if patches else None,
        views=None if views is None else check_recipe(views),
    )
    if existing is None:
        write_about(out, wanted)
        return _Plan(wanted, out, None, 0)
    _check_same(existing, wanted, out)
    if existing.plan == wanted.plan and existing.part_size == size:
        return _Plan(wanted, out, None, 0)
    if existing.plan == wanted.plan and not update:
        raise GalleryError(f"{out} has parts of {existing.part_size} images, not {size}. Leave the size of parts out.")
    old = open_old_parts(out)
    changes = old.changes([record.key for record in source.records], stamps)
    if not update:
        raise DataError(
            f"The source is not the one {out} was begun with: {changes}. Give --update to embed what is new or "
            "changed and drop what is gone, or name another --out."
        )
    target = stage_folder(out, wanted.plan)
    write_about(target, wanted)
    return _Plan(wanted, target, out, changes.num_removed)


def _check_same(existing: About, wanted: About, out: Path) -> None:
    existing.fingerprint.require_same(wanted.fingerprint, f"Features in {out}", "this model")
    if existing.precision != wanted.precision:
        raise GalleryError(f"{out} holds {existing.precision}, not {wanted.precision}. Name another --out.")
    if existing.grid != wanted.grid:
        has, lacks = ("with", "without") if existing.grid else ("without", "with")
        raise GalleryError(f"{out} was begun {has} --patches, this is {lacks}. Do as before, or name another --out.")
    if existing.views != wanted.views:
        found, asked = (f"--views {one.views}" if one.views else "without --views" for one in (existing, wanted))
        raise GalleryError(f"{out} was begun {found}, this is {asked}. Do as before, or name another --out.")


def _jobs(
    plan: _Plan, records: Sequence[Record], stamps: Sequence[Stamp], model: str, batch_size: int, workers: int | None
) -> list[Job]:
    about = plan.about
    return [
        Job(
            target=plan.target,
            number=number,
            num_parts=about.num_parts,
            records=tuple(map(_elsewhere, records[start : start + about.part_size], stamps[start:])),
            stamps=tuple(stamps[start : start + about.part_size]),
            fingerprint=about.fingerprint,
            model=model,
            old=plan.old,
            precision=about.precision,
            grid=about.grid,
            views=about.views,
            with_texts=any(record.captions for record in records),
            batch_size=batch_size,
            workers=workers,
        )
        for number, start in enumerate(range(0, len(records), about.part_size))
    ]


def _elsewhere(record: Record, stamp: Stamp) -> Record:
    """The record as a process in another folder finds it."""
    return record if record.image.path is None else replace(record, image=replace(record.image, path=stamp.path))


def _plan_hash(records: Sequence[Record], stamps: Sequence[Stamp]) -> str:
    found = hashlib.sha256()
    for record, stamp in zip(records, stamps, strict=True):
        line = repr((record.key, tuple(stamp), record.captions, record.label, record.split))
        found.update(line.encode("utf-8", "backslashreplace"))
    return found.hexdigest()
