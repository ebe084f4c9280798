"""`vlkit shards reinforce`: a teacher's features into shards. Registered in `shards.py`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import Json, Precision, print_json, print_table, progress_bar, say
from vlkit.cli.options import BatchSize, Shards
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.config import AugmentSettings


class Stored(StrEnum):
    """Of the numbers in the shards."""

    FP16 = "fp16"
    FP32 = "fp32"


def reinforce(
    shards: Shards,
    teacher: Annotated[str, typer.Option(help="Any --model name: open_clip:ARCHITECTURE/TAG, hf:NAME, run:FOLDER.")],
    out: Annotated[Path, typer.Option(help="Folder for the copy; one begun with the same teacher is continued.")],
    field: Annotated[
        list[str] | None,
        typer.Option(help="Field of the .json files whose texts get features too; may be repeated."),
    ] = None,
    views: Annotated[
        int, typer.Option(min=0, help="Randomly changed views of each image that get features too; MobileCLIP has 30.")
    ] = 0,
    run: Annotated[
        str | None,
        typer.Option(help="Run file (or name) that will train on them: its data.augment changes the views."),
    ] = None,
    precision: Annotated[Stored, typer.Option(help="Of the numbers stored.")] = Stored.FP16,
    teacher_precision: Annotated[Precision, typer.Option(help="Of the teacher's weights.")] = Precision.FP32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch_size: BatchSize = 64,
    json: Json = False,
) -> None:
    """Store a teacher's image and text features in a copy of shards, for training with loss.distillation.

    A run reads them with `[loss] distillation = 1.0` and no teacher named. Without --views they are those of the whole
    image: keep data.augment weak, or off. With it, each epoch shows one of the views that the teacher has seen.
    """
    from data_tools.reinforce import reinforce_shards
    from vlkit.models.load import load_embedder

    augment = _augment_of(run) if views else None
    if run is not None and not views:
        say("--run has no effect without --views.")
    embedder = load_embedder(teacher, device=device, precision=teacher_precision.value)
    with progress_bar("reinforce", "samples") as progress:
        report = reinforce_shards(
            shards,
            embedder,
            out,
            fields=field or (),
            views=views,
            augment=augment,
            precision=precision.value,
            batch_size=batch_size,
            progress=progress,
        )
    if report.num_shards_kept:
        say(f"continued: {report.num_shards_kept} of {report.num_shards} shards were there already")
    for key, reason in report.failures[:5]:
        say(f"no features of the image of {key}: {reason}")
    if len(report.failures) > 5:
        say(f"... and of {len(report.failures) - 5} more images")
    if json:
        print_json(report.to_json())
        return
    rows = [
        ("shards", report.num_shards),
        ("samples", report.num_samples),
        ("texts embedded", report.num_texts),
        ("views of each image", report.teacher.views),
        ("unreadable images", len(report.failures)),
        ("width of the features", report.teacher.embed_dim),
        ("logit scale", f"{report.teacher.logit_scale:.4g}"),
        ("MB", f"{report.tar_bytes / 1e6:.1f}"),
    ]
    print_table(f"{report.out}: features of {report.teacher.fingerprint.model}", ("", ""), rows)


def _augment_of(run: str | None) -> "AugmentSettings":
    """`data.augment` of a run file, by default that of every run file that says nothing of it."""
    from vlkit.config import AugmentSettings, load_run

    if run is None:
        return AugmentSettings()
    settings = load_run(run).data.augment
    if settings is None:
        raise ConfigError(f"data.augment is off in {run}, so there are no views. Leave --views out, or switch it on.")
    return settings
