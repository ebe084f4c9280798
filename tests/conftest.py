"""What every test shares: the environment it runs in, the real data, and two ways of calling the command.

Fixtures:
    vlkit_data      folder of real data sets ($VLKIT_DATA); skips the test where it is not set.
    general_encoder folder of the small trained encoder that methods are measured on (`make encoder`).
    call_vlkit      calls the command line in this process: `call_vlkit("info", "--json").out`.
    spawn_vlkit     calls it in a process of its own (costs what it imports): `spawn_vlkit("info", cwd=tmp_path)`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

# Set before anything imports torch, matplotlib or huggingface_hub, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads

# Generated cases are the same in each run; no deadline, because a busy machine is not an error.
settings.register_profile("vlkit", deadline=None, derandomize=True)
settings.load_profile("vlkit")


class Called(NamedTuple):
    """How a call of the command ended."""

    code: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip where there is none; torch is imported only when such a test was chosen."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not _has_cuda():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path_factory.getbasetemp() / "vlkit_cache"))


@pytest.fixture(scope="session")
def vlkit_data() -> Path:
    folder = os.environ.get("VLKIT_DATA")
    if not folder:
        pytest.skip("VLKIT_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def general_encoder() -> Path:
    return Path(__file__).parent / "data" / "encoder"


@pytest.fixture
def call_vlkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    from vlkit.cli import main

    def call(*arguments: object) -> Called:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        code = leaving.value.code
        printed = capsys.readouterr()
        return Called(code if isinstance(code, int) else int(code is not None), printed.out, printed.err)

    return call


@pytest.fixture
def spawn_vlkit() -> Callable[..., Called]:
    def spawn(*arguments: object, cwd: Path | None = None, **environment: Any) -> Called:
        command = [sys.executable, "-c", "from vlkit.cli import main; main()", *(str(a) for a in arguments)]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        return Called(done.returncode, done.stdout, done.stderr)

    return spawn


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
