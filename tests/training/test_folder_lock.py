"""A run folder has one writer; who it is is said; nobody is kept out by one that was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlkit.errors import CheckpointError
from vlkit.training.folder_lock import FolderLock, describe

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from vlkit.training.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_live_writer_is_named_and_a_dead_one_keeps_nobody_out(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = rf"is being written by process {holder.pid} on host .* since 20\d\d-.* UTC\. .*run\.out"
        for _ in range(2):
            with pytest.raises(CheckpointError, match=message):
                FolderLock(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
    lock = FolderLock(tmp_path)
    assert lock.ended_badly is not None and f"process {holder.pid} on host" in lock.ended_badly
    lock.release()
    lock.release()
    again = FolderLock(tmp_path)
    assert again.ended_badly is None
    again.release()


def test_the_same_process_cannot_write_twice(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "new")
    with pytest.raises(CheckpointError, match="by this very process"):
        FolderLock(tmp_path / "new")
    lock.release()


def test_what_another_version_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "writer.lock").write_text("[1, 2")
    FolderLock(tmp_path).release()
    assert describe({}) == "another process"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write the run folder"):
        FolderLock(tmp_path / "file")
