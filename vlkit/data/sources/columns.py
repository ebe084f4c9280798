"""Which column of a table holds what, by the names in use, and labels from what a class column says."""

from collections.abc import Sequence
from pathlib import Path

from vlkit.data.sources.annotated import Annotated
from vlkit.errors import ConfigError, did_you_mean
from vlkit.escape import one_line

IMAGE_COLUMNS = ("filepath", "image", "path")
CAPTION_COLUMNS = ("caption", "title", "text", "captions")
LABEL_COLUMNS = ("class", "class_name", "label")
SPLIT_COLUMN = ("split",)
URL_COLUMNS = ("url", "image_url", "link")


def find_column(header: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that bears the first of `names` that is there, in any case."""
    lowered = {column.strip().lower(): column for column in reversed(header)}
    return next((lowered[name] for name in names if name in lowered), None)


def column_named(
    header: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, path: Path
) -> str | None:
    """The column the user named, else one of the usual ones; None when there is none of these.

    Raises:
        ConfigError: the named column does not exist.
    """
    if wanted is None:
        return find_column(header, usual)
    found = wanted if wanted in header else find_column(header, [wanted.lower()])
    if found is None:
        have = one_line(", ".join(header), 300)
        raise ConfigError(
            f"{path}: column '{wanted}' ({option}) not found, have: {have}. {did_you_mean(wanted, header)}"
        )
    return found


def label_images(images: Sequence[Annotated], classes: Sequence[str | None]) -> tuple[str, ...]:
    """Give images their labels and return the class names; whole numbers >= 0 are labels already."""
    given = {name for name in classes if name is not None}
    # The limit keeps a stray identifier in a column `label` from asking for billions of class names.
    if given and all(name.isdecimal() and len(name) < 7 for name in given):
        names = [str(label) for label in range(max(int(name) for name in given) + 1)]
        label_of = {name: int(name) for name in given}
    else:
        names = sorted(given)
        label_of = {name: label for label, name in enumerate(names)}
    for image, name in zip(images, classes, strict=True):
        image.label = None if name is None else label_of[name]
    return tuple(names)
