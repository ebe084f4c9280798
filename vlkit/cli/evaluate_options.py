"""Options that several commands of `vlkit eval` have in common, one definition each: data with classes, numbers, names.

A command that takes one of the groups below as a parameter gets its fields as options; see `with_shared_options`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import say
from vlkit.cli.evaluate_common import ClassNames, Data, Exclude, Format, Images, Split, read_classes, remark_on
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from eval.class_names import NamedClasses
    from vlkit.data.records import Source

Seed = Annotated[int, typer.Option(help="Of the division of data without splits, and of the bootstrap.")]


@dataclass(frozen=True)
class ClassData:
    """Images with classes, of which a part trains and a part tests: the data's own, or divided by the seed."""

    data: Data
    class_names: ClassNames = None
    exclude: Exclude = None
    format: Format = None
    images: Images = None

    def read(self) -> "tuple[Source, NamedClasses]":
        """The data and its classes by name; what is remarkable about either is said."""
        return read_classes(self.data, self.images, self.format, None, self.class_names, self.exclude)


@dataclass(frozen=True)
class ClassSplit:
    """Images with classes, all of them or one split."""

    data: Data
    class_names: ClassNames = None
    exclude: Exclude = None
    format: Format = None
    images: Images = None
    split: Split = None

    def read(self) -> "tuple[Source, NamedClasses]":
        """The data and its classes by name; what is remarkable about either is said."""
        return read_classes(self.data, self.images, self.format, self.split, self.class_names, self.exclude)

    def read_if_any(self) -> "tuple[Source, NamedClasses]":
        """The same of a folder that nobody need have sorted: without classes there are no names."""
        from eval.class_names import NamedClasses
        from vlkit.data.sources import read_source

        if self.class_names is None and not self.exclude:
            source = read_source(self.data, format=self.format, images=self.images, split=self.split)
            if not source.class_names:
                remark_on(source, self.split)
                say("The images have no classes, so nothing is measured; --per-item FILE.parquet keeps what is found.")
                return source, NamedClasses((), tuple(source.records), "none", 0, ())
        return self.read()


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Different whole numbers from 1, separated by commas.

    Raises:
        ConfigError: anything else; names the option.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected whole numbers separated by commas, e.g. 1,2,4.") from None
    if len(set(numbers)) != len(numbers) or min(numbers) < 1:
        raise ConfigError(f"{option} {text!r}: expected different numbers from 1.")
    return numbers


def named_path(item: str) -> tuple[str, str]:
    """`NAME=PATH` as the two; a path alone is named after its folder or file."""
    name, equals, path = item.partition("=")
    if equals and name and path and not Path(item).exists():
        return name, path
    return Path(item).stem, item


def read_lines_of(file: Path, what: str) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: it cannot be read; names what it should hold.
    """
    from vlkit.errors import DataError

    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the {what} {file}: {error}.") from error
