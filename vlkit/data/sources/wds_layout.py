"""The files that CLIP_benchmark's `wds` layout lays beside its tars, about 40 data sets of which are on the Hub.

vtab-pets/classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt
vtab-pets/test/nshards.txt, 0.tar, 1.tar, ...
"""

import io
from pathlib import Path

import numpy as np

from vlkit.data.sources.annotated import read_text
from vlkit.errors import DataError

MULTI_LABEL = "multilabel"
_TYPES = ("classification", "retrieval", MULTI_LABEL)


def check_shard_count(folder: Path) -> None:
    """Compare the tars of a folder with its `nshards.txt`, if it has one.

    Raises:
        DataError: some are missing, as after a download that broke off.
    """
    stated = folder / "nshards.txt"
    if not stated.is_file():
        return
    text = read_text(stated).strip()
    if not text.isdecimal():
        raise DataError(f"{stated} holds '{text[:40]}', expected the number of tars.")
    found = len(list(folder.glob("*.tar")))
    if found < int(text):
        missing = [f"{n}.tar" for n in range(int(text)) if not (folder / f"{n}.tar").is_file()]
        raise DataError(f"{folder} has {found} of {text} tars (missing: {', '.join(missing[:5])}). Download it again.")


def dataset_type(folder: Path) -> str | None:
    """`classification`, `retrieval` or `multilabel`, from `dataset_type.txt` in or above a folder.

    Raises:
        DataError: another word stands there.
    """
    text = _text_beside(folder, "dataset_type.txt")
    if text is None:
        return None
    if text.strip() not in _TYPES:
        raise DataError(f"{folder}: dataset_type.txt says '{text.strip()[:40]}', expected {' | '.join(_TYPES)}.")
    return text.strip()


def templates_beside(folder: Path) -> tuple[str, ...]:
    """The prompts of `zeroshot_classification_templates.txt` in or above a folder, `{c}` turned into `{}`.

    Raises:
        DataError: a line has no `{c}`.
    """
    text = _text_beside(folder, "zeroshot_classification_templates.txt")
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    for line in lines:
        if "{c}" not in line:
            raise DataError(f"{folder}: the template '{line[:80]}' has no {{c}} for the class name.")
    return tuple(line.replace("{c}", "{}") for line in lines)


def multi_hot_labels(data: bytes, where: str) -> tuple[int, ...]:
    """The classes set in a `.npy` file of zeros and ones (C,).

    Raises:
        DataError: it is no such array.
    """
    try:
        # allow_pickle stays off: an array of objects may run any code.
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{where}: .npy cannot be read: {error}.") from error
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise DataError(f"{where}: .npy holds an array {values.shape} {values.dtype}, expected zeros and ones (C,).")
    return tuple(int(label) for label in np.flatnonzero(values))


def _text_beside(folder: Path, name: str) -> str | None:
    return next((read_text(place / name) for place in (folder, folder.parent) if (place / name).is_file()), None)
