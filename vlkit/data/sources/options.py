"""What a caller may say about a source beyond its path, and the names a split goes by."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from vlkit.errors import ConfigError, DataError

# Data sets disagree on these names; one name each is what users type and records carry.
_SPLIT_ALIASES = {"dev": "val", "valid": "val", "validation": "val", "training": "train", "testing": "test"}
STANDARD_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SourceOptions:
    """The options of `read_source` that only some formats can use; None where the user said nothing."""

    images: Path | None = None
    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    class_column: str | None = None

    def check_used(self, name: str, used: Iterable[str]) -> None:
        """Refuse an option that would have no effect: mostly it means that the format is another than meant.

        Raises:
            ConfigError: an option outside `used` is set.
        """
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        idle = sorted(set(given) - set(used))
        if idle:
            options = ", ".join("--" + option.replace("_", "-") for option in idle)
            raise ConfigError(
                f"{options} has no effect on a source of format '{name}'. Leave it out, or name another --format."
            )


def canonical_split(name: str) -> str:
    """The one name of a split: lower case, `dev` and `validation` are `val`."""
    lowered = name.strip().lower()
    return _SPLIT_ALIASES.get(lowered, lowered)


def require_split(wanted: str | None, present: Iterable[str | None], where: Path | str) -> str | None:
    """The canonical name of the wanted split, None when none is wanted.

    Args:
        wanted: what the user asked for.
        present: the canonical splits the source has; None stands for rows of no split.
        where: named in the message.

    Raises:
        DataError: the source does not have that split.
    """
    if wanted is None:
        return None
    name = canonical_split(wanted)
    have = sorted({split for split in present if split is not None}, key=_split_order)
    if name in have:
        return name
    if not have:
        raise DataError(f"Split '{wanted}' was asked for, but {where} names no splits. Leave --split out.")
    raise DataError(f"No split '{wanted}' in {where}. Present: {', '.join(have)}.")


def _split_order(name: str) -> tuple[int, str]:
    return (STANDARD_SPLITS.index(name) if name in STANDARD_SPLITS else len(STANDARD_SPLITS), name)
