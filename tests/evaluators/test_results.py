"""Result lines: what they hold, and that appending survives crashes and several writers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.results import append_result, check_writable, read_results, result_line, run_facts
from vlkit.contracts import Evaluation
from vlkit.errors import DataError

WRITER = """
import sys
from eval.results import append_result
for number in range(25):
    append_result(sys.argv[1], {"writer": int(sys.argv[2]), "number": number, "filling": "x" * 3000})
"""


def test_a_line_holds_what_makes_it_comparable() -> None:
    evaluation = Evaluation(
        metrics={"accuracy@1": 1 / 3},
        intervals={"accuracy@1": (0.1, 0.55)},
        protocol={"templates": "simple", "templates_hash": "abc"},
        counts={"images": 3},
    )
    line = result_line(
        evaluation,
        task="classification",
        model="run:here",
        identity="123",
        data="photos",
        format="folder",
        split=None,
        left_out={"unreadable": ["b.jpg"]},
        run=run_facts(time.time(), "cpu"),
    )
    assert line["templates_hash"] == "abc"
    assert line["metrics"]["accuracy@1"] == pytest.approx(1 / 3, abs=1e-8)
    assert line["intervals"] == {"accuracy@1": [0.1, 0.55]}
    assert set(line["run"]) == {"seconds", "started", "host", "platform", "device", "versions"}
    assert {"torch", "vlkit", "python"} <= set(line["run"]["versions"])
    assert json.loads(json.dumps(line)) == line


def test_a_torn_last_line_spoils_nothing_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.jsonl"
    append_result(path, {"number": 1, "caption": "Füchse\u2028\udc80"})
    with path.open("ab") as file:
        file.write(b'{"number": 2, "metr')  # the process died here
    append_result(path, {"number": 3})
    append_result(path, {"number": 4})
    lines, num_broken = read_results(path)
    assert [line["number"] for line in lines] == [1, 3, 4]
    assert num_broken == 1


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    root = Path(__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(number)], cwd=root) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines, num_broken = read_results(path)
    assert num_broken == 0
    assert sorted((line["writer"], line["number"]) for line in lines) == [(w, n) for w in range(3) for n in range(25)]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot write results to .*Name another file"):
        check_writable(tmp_path / "file" / "results.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_result(tmp_path / "results.jsonl", {"value": float("nan")})
    with pytest.raises(DataError, match="Cannot read results"):
        read_results(tmp_path / "none.jsonl")
