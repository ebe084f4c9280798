"""Pickles of other projects' data files, read without running anything: numbers, texts, lists and dicts only."""

import pickle
from pathlib import Path
from typing import Any

from vlkit.errors import DataError


class _PlainData(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"it holds an object of {module}.{name}, which could run code. Write it as JSON")


def load_plain(file: Path) -> Any:
    """What a pickle of plain data holds; those of Python 2 too.

    Raises:
        DataError: unreadable, damaged, or with anything but plain data in it.
    """
    try:
        with file.open("rb") as stream:
            return _PlainData(stream, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{file} is not read: {error}.") from None
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:
        raise DataError(f"Cannot read {file}: {error}.") from error
