"""A new set of features takes the place of an old one: built beside it, then moved in, whatever kills the mover.

The new parts are written to `OUT/.update-PLAN/`. When all are there, a file `complete` says so and lists the folders to
move; from then on moving is repeated until it is done, and readers refuse the folder meanwhile.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError

STAGE = ".update-"
COMPLETE = "complete"


def stage_folder(out: Path, plan: str) -> Path:
    """Where the new parts of one plan are built; a killed update of the same plan continues there."""
    return out / f"{STAGE}{plan[:16]}"


def move_in(out: Path, stage: Path, folders: Sequence[str], about: str) -> None:
    """Replace the old set by a finished new one.

    Args:
        out: the folder of features.
        stage: below it, holding the new ones.
        folders: all names a set of features may have; those the new one lacks are removed.
        about: the file that describes a set; moved last.
    """
    with atomic_file(stage / COMPLETE) as file:
        file.write(json.dumps([name for name in folders if (stage / name).exists()]).encode())
    _move(out, stage, folders, about)


def finish_move(out: Path, folders: Sequence[str], about: str) -> None:
    """Finish what `move_in` was killed in, if it was."""
    for marker in out.glob(f"{STAGE}*/{COMPLETE}"):
        _move(out, marker.parent, folders, about)


def _move(out: Path, stage: Path, folders: Sequence[str], about: str) -> None:
    try:
        moving = json.loads((stage / COMPLETE).read_text(encoding="utf-8"))
        for name in folders:
            if name not in moving:
                shutil.rmtree(out / name, ignore_errors=True)
            elif (stage / name).exists():  # else it is in place already
                if (out / name).exists():
                    shutil.rmtree(out / name)
                (stage / name).rename(out / name)
        if (stage / about).exists():
            (stage / about).replace(out / about)
        for left in out.glob(f"{STAGE}*"):  # also those of updates that were given up
            shutil.rmtree(left)
    except OSError as error:
        raise DataError(f"Cannot finish the update of {out}: {error.strerror or error}. Run it again.") from error
