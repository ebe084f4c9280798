"""Class names as people write them: `name | synonym | synonym`, checked for blanks and doubles."""

from collections.abc import Sequence
from typing import NamedTuple

from vlkit.errors import ConfigError


class ClassName(NamedTuple):
    """A class as it is shown, and every name it goes by in prompts (the shown one first)."""

    shown: str
    names: tuple[str, ...]


def parse_class(line: str) -> ClassName:
    """`name | synonym | synonym` as a class shown under its first name.

    Raises:
        ConfigError: a name between the bars is empty.
    """
    names = tuple(part.strip() for part in line.split("|"))
    if not all(names):
        raise ConfigError(f"Class {line!r} has an empty name; write `name` or `name | synonym`.")
    return ClassName(names[0], names)


def parse_class_list(lines: Sequence[str], where: str = "the class list") -> list[ClassName]:
    """The classes of a file's lines or of a comma-separated option, checked.

    Raises:
        ConfigError: a blank line (named by its number), no class at all, or duplicates.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ConfigError(
                f"Entry {number} of {where} is blank; every entry must be a class name. Remove the blank line."
            )
    return check_classes([parse_class(line) for line in lines], where)


def check_classes(classes: Sequence[ClassName], where: str = "the class list") -> list[ClassName]:
    """The classes, once there is at least one and no name stands for two of them.

    Raises:
        ConfigError: empty, or a name occurs twice (letter case ignored).
    """
    if not classes:
        raise ConfigError(f"There is no class in {where}; give at least one name.")
    owner: dict[str, str] = {}
    for item in classes:
        for name in item.names:
            if name.lower() in owner:
                raise ConfigError(
                    f"Class name {name!r} stands twice in {where} (under {owner[name.lower()]!r} and {item.shown!r}); "
                    "every name may belong to one class only. Remove one."
                )
            owner[name.lower()] = item.shown
    return list(classes)
