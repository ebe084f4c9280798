"""The list of broken samples: each once, whoever finds it and however often a run is begun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlkit.data.quarantine import Quarantine
from vlkit.data.sample_reader import Failure
from vlkit.errors import DataError


def failure(number: int, cause: str = "truncated", message: str = "cut") -> Failure:
    return Failure(0, f"{number // 10:05}.tar", f"{number // 10:05}/{number:06}", cause, message, number)


def keys(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_each_sample_once_over_ranks_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first, second = Quarantine(path), Quarantine(path)
    first.add([])
    assert not path.exists()
    first.add([failure(1), failure(12, "not an image")])
    second.add([failure(12, "not an image"), failure(3)])
    first.add([failure(3), failure(1), failure(4)])
    assert keys(path) == ["00000/000001", "00001/000012", "00000/000003", "00000/000004"]
    assert json.loads(path.read_text().splitlines()[1]) == {
        "sample": 12,
        "shard": "00001.tar",
        "key": "00001/000012",
        "cause": "not an image",
        "message": "cut",
    }
    again = Quarantine(path)
    again.add([failure(4)])
    assert len(keys(path)) == 4
    assert again.record() == {
        "broken": 4,
        "causes": {"truncated": 3, "not an image": 1},
        "shards": {"00000.tar": {"truncated": 3}, "00001.tar": {"not an image": 1}},
    }
    assert second.num_samples == 3
    second.refresh()
    assert second.num_samples == 4


def test_two_sources_may_have_shards_and_keys_of_one_name(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.add([failure(1), failure(1)._replace(sample=5001)])
    assert quarantine.num_samples == 2


def test_hostile_text_acts_on_nothing(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    nasty = Failure(0, "a\u202e.tar", 'a/\x1b[31m"\n<b>\ud800', "truncated", "x\n\x1b]0;title\x07" + "y" * 9999, 5)
    Quarantine(path).add([nasty])
    written = path.read_bytes()
    assert written.isascii() and written.count(b"\n") == 1 and b"\x1b" not in written and len(written) < 800
    line = json.loads(written)
    assert line["key"] == nasty.key and line["shard"] == nasty.shard and "\x1b" not in line["message"]


def test_a_line_cut_by_a_kill_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add([failure(1), failure(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = Quarantine(path)
    again.add([failure(2), failure(3)])
    assert keys(path) == ["00000/000001", "00000/000002", "00000/000003"]
    path.write_bytes(b"[1]\nnonsense\n" + path.read_bytes())
    Quarantine(path).add([failure(1)])
    assert path.read_bytes().count(b"\n") == 5  # what others wrote is left alone


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "quarantine.jsonl").mkdir()
    with pytest.raises(DataError, match=r"Cannot write .*quarantine\.jsonl: Is a directory"):
        Quarantine(tmp_path / "quarantine.jsonl").add([failure(1)])


SCRIPT = """
import sys
from pathlib import Path
from vlkit.data.quarantine import Quarantine
from vlkit.data.sample_reader import Failure
mine = Quarantine(Path(sys.argv[1]))
for number in range(300):
    mine.add([Failure(0, "0.tar", f"0/{number:06}", "truncated", "cut " * 50, number)])
"""


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert sorted(keys(path)) == [f"0/{number:06}" for number in range(300)]
