"""Work in parts on real processes: order, errors, workers that die, parents that are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vlkit
from vlkit.engine import map_parts
from vlkit.errors import ConfigError, DataError, VlkitError

FUNCTIONS = """
import os, signal, sys, time
from pathlib import Path
from vlkit.errors import DataError
def square(n):
    return n * n
def fail_on_two(n):
    if n == 2:
        raise DataError("part 2 is broken")
    return n
def die_on_two(n):
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return n
def report_and_wait(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)
"""

PARENT = """
import sys
sys.path[:0] = sys.argv[1:3]
import parts
from vlkit.engine import map_parts
if __name__ == "__main__":
    list(map_parts(parts.report_and_wait, [sys.argv[3]] * 2, workers=2))
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Functions in a module that spawned processes can import: with importlib mode, a test file is none."""
    (tmp_path / "parts.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import parts

    yield parts
    del sys.modules["parts"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_part_once(parts, workers):
    assert sorted(map_parts(parts.square, range(20), workers)) == [(n, n * n) for n in range(20)]
    assert list(map_parts(parts.square, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_part_is_raised(parts, workers):
    with pytest.raises(DataError, match="part 2 is broken"):
        list(map_parts(parts.fail_on_two, range(50), workers))


def test_a_worker_that_dies_is_told(parts):
    with pytest.raises(VlkitError, match=r"A worker process died.*finished parts are kept"):
        list(map_parts(parts.die_on_two, range(4), workers=2))


def test_workers_end_with_a_killed_parent(parts, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "pids").mkdir()
    root = Path(vlkit.__file__).parents[1]
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", root, tmp_path, tmp_path / "pids"])
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_an_unknown_engine():
    with pytest.raises(ConfigError, match=r"Unknown engine 'rai'. .*ray"):
        list(map_parts(len, ["x"], 1, engine="rai"))


def test_ray_that_does_not_start(monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")

    def init(**options):
        raise ConnectionError("No cluster at 127.0.0.1:1.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(VlkitError, match=r"Ray does not start: No cluster at .* RAY_ADDRESS"):
        list(map_parts(len, ["x"], 1, engine="ray"))


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlkit\[ray\]'"):
        list(map_parts(len, ["x"], 1, engine="ray"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_on_a_local_ray(parts, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    places = os.pathsep.join([str(tmp_path), str(Path(vlkit.__file__).parents[1])])
    environment = {"env_vars": {"PYTHONPATH": places}}
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env=environment)
    try:
        assert sorted(map_parts(parts.square, range(20), 0, "ray")) == [(n, n * n) for n in range(20)]
        assert list(map_parts(parts.square, [], 2, "ray")) == []
        with pytest.raises(DataError, match="part 2 is broken"):
            list(map_parts(parts.fail_on_two, range(50), 2, "ray"))
        with pytest.raises(VlkitError, match=r"A worker of Ray was lost.*finished parts are kept"):
            list(map_parts(parts.die_on_two, range(4), 2, "ray"))
    finally:
        ray.shutdown()
