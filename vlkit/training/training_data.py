"""From the [data] section of a run to the training set, the plan of its batches, and the choice of captions."""

from pathlib import Path
from typing import Any, NamedTuple

from vlkit.config import CaptionSettings, RunConfig
from vlkit.contracts import Progress
from vlkit.data.caption_choice import CaptionChoice, check_fields
from vlkit.data.pass_order import WINDOW
from vlkit.data.replay import Replay
from vlkit.data.sampling import PlannedData, Sampling, TrainingSet, open_training_set, plan_batches
from vlkit.data.shard_index import ShardSet
from vlkit.distributed import rank, world_size
from vlkit.errors import ConfigError
from vlkit.models.prompt_templates import load_templates
from vlkit.training.checkpoint import differences
from vlkit.training.stored_teacher import StoredTeacher, TeacherRecord, teacher_of


class Stored(NamedTuple):
    """A teacher whose features lie in the shards."""

    teacher: StoredTeacher
    record: TeacherRecord | None  # None where nothing says which teacher it was
    replay: Replay | None  # the views of the images that it has features of


def open_data(run: RunConfig, progress: Progress | None = None) -> TrainingSet:
    """The training shards of a run.

    Raises:
        DataError: see `ShardSet.open`.
    """
    return open_training_set(run.data.train, progress, cache_size=run.data.cache_size)


def plan_data(run: RunConfig, data: TrainingSet, progress: Progress | None = None) -> PlannedData:
    """The batches of this process.

    Raises:
        ConfigError, DataError: see `plan_batches`.
    """
    settings = run.data
    return plan_batches(
        data,
        Sampling(settings.remainder, settings.samples_per_epoch, settings.replacement, settings.balance),
        seed=run.run.seed,
        global_batch_size=settings.global_batch_size,
        rank=rank(),
        world_size=world_size(),
        window=settings.window,
        progress=progress,
    )


def choose_captions(run: RunConfig, data: TrainingSet) -> CaptionChoice | None:
    """How the texts of an image are chosen; None for the captions as they are.

    Raises:
        ConfigError: templates or class names that cannot be read.
        DataError: no sample has a field that is named.
    """
    settings = run.data.captions
    if settings is None:
        return None
    templates = () if settings.templates is None else load_templates(settings.templates)
    choice = CaptionChoice(
        per_image=run.data.captions_per_image,
        fields=tuple((settings.fields or {}).items()),
        sub_captions=settings.sub_captions or 0,
        most_sentences=settings.most_sentences,
        templates=templates,
        class_names=_class_names(settings, data) if templates and settings.class_field is None else (),
        class_field=settings.class_field,
    )
    check_fields(data.shards, choice)
    return choice


def stored_teacher(run: RunConfig, shards: ShardSet) -> Stored | None:
    """What gives the teacher's features where the run distils from features in the shards; else None.

    Raises:
        DataError: the shards hold features of different teachers.
        ConfigError: they are of views by other random changes than this run's.
    """
    settings = run.loss.distillation
    if settings is None or settings.teacher is not None:
        return None
    record = teacher_of(shards)
    teacher = StoredTeacher(shards, record, own_scale=settings.logit_scale is None)
    return Stored(teacher, record, _replay(run, record))


def _replay(run: RunConfig, record: TeacherRecord | None) -> Replay | None:
    if record is None or not record.views or run.data.augment is None:
        return None
    changed = differences(record.augment or {}, run.data.augment.model_dump(mode="json"), "data.augment.")
    if changed:
        raise ConfigError(
            "The teacher's features in the shards are of images changed by other settings (there -> now): "
            f"{'; '.join(changed)}. Take those settings, or data.augment = false for the features of whole images."
        )
    return Replay(record.views)


def order_record(run: RunConfig, planned: PlannedData) -> dict[str, Any]:
    """What about order and captions must be the same for a run to be continued; nothing that is as by default."""
    record: dict[str, Any] = {"order": dict(planned.record)} if planned.record else {}
    if run.data.window != WINDOW:
        record["window"] = run.data.window
    if run.data.captions is not None:
        record["captions"] = run.data.captions.model_dump(mode="json")
    return record


def more_identity(run: RunConfig, planned: PlannedData, stored: Stored | None) -> dict[str, Any]:
    """`order_record`, and which teacher's features the shards hold, where they say it."""
    teacher = {} if stored is None or stored.record is None else {"stored_teacher": stored.record.identity()}
    return {**order_record(run, planned), **teacher}


def _class_names(settings: CaptionSettings, data: TrainingSet) -> tuple[str, ...]:
    """One name a line, from the file that is named, or from classnames.txt beside or above the first shard."""
    folder = data.shards.shards[0].path.parent
    beside = [folder / "classnames.txt", folder.parent / "classnames.txt"]
    tried = beside if settings.class_names is None else [Path(settings.class_names)]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"data.captions.templates needs the names of the classes, and there is no {tried[0]}. Name a file with one "
            "name a line as data.captions.class_names, or a field of the .json files as data.captions.class_field."
        )
    try:
        # Only the end may be blank: a blank line in between would shift the names of all labels after it.
        return tuple(line.strip() for line in found.read_text(encoding="utf-8").rstrip().split("\n"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read class names from {found}: {error}.") from error
