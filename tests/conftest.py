"""What every test shares: the environment it runs in, the real data, two ways of calling the command, models, tars.

Fixtures:
    vlkit_data      folder of real data sets ($VLKIT_DATA); skips the test where it is not set.
    general_encoder folder of the small trained encoder that methods are measured on (`make encoder`).
    call_vlkit      calls the command line in this process: `call_vlkit("info", "--json").out`.
    spawn_vlkit     calls it in a process of its own (costs what it imports): `spawn_vlkit("info", cwd=tmp_path)`.
    models          two CLIPs of 16 pixels with random weights, as `--model` takes them; imports open_clip.
    write_tar       `write_tar(path, [("a.jpg", b"..."), ...])`: a tar of these files, in this order.
"""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    import torch

    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    names = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"model_{seed}")
        save_encoder(build_encoder(architecture), folder)
        names.append(f"local-dir:{folder}")
    return names


# Of the session, so that fixtures of any scope can write with it.
@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    def write(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.DEFAULT_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=form, encoding="utf-8") as tar:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    return write


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
