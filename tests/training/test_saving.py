"""Writing in the background and uploading: one at a time, failures surface, the local copy never suffers."""

import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from vlkit.errors import CheckpointError, ConfigError
from vlkit.models.saved import check_manifest, write_manifest
from vlkit.training.checkpoint import checkpoint_folder, checkpoints, latest_good
from vlkit.training.saving import BackgroundWriter, Uploader

ROOT = Path(__file__).resolve().parents[2]


def test_the_caller_goes_on_and_a_second_piece_waits_for_the_first() -> None:
    writer, go, order = BackgroundWriter(), threading.Event(), []

    def first() -> None:
        go.wait()
        order.append("first")

    writer.submit(first)
    writer.check()  # not done yet: nothing to say
    order.append("caller")
    threading.Timer(0.05, go.set).start()
    writer.submit(lambda: order.append("second"))
    assert order[:2] == ["caller", "first"]
    writer.close()
    assert order == ["caller", "first", "second"]


def test_a_failure_surfaces_once_at_the_next_call() -> None:
    def fail() -> None:
        raise CheckpointError("no space")

    for surface in (lambda w: w.submit(lambda: None), lambda w: w.wait(), lambda w: w.close()):
        writer = BackgroundWriter()
        writer.submit(fail)
        with pytest.raises(CheckpointError, match="no space"):
            surface(writer)
        writer.close()
    with pytest.raises(CheckpointError):
        BackgroundWriter(in_background=False).submit(fail)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "step_1" / "model").mkdir(parents=True)
    (tmp_path / "step_1" / "model" / "weights").write_bytes(b"w" * 1000)
    (tmp_path / "step_1" / "state.json").write_text("{}")
    write_manifest(tmp_path / "step_1")
    return tmp_path / "step_1"


def test_a_folder_arrives_whole(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    uploader = Uploader(f"file://{tmp_path}/there/", said.append)
    uploader.submit(folder, "checkpoints/step_1")
    uploader.submit(folder / "state.json", "state.json")
    uploader.close()
    assert said == []
    assert check_manifest(tmp_path / "there" / "checkpoints" / "step_1") is None
    assert (tmp_path / "there" / "state.json").read_text() == "{}"


def test_the_manifest_goes_last(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    uploader = Uploader("memory://bucket/run", print)
    uploader.submit(folder, "step_1")
    uploader.close()
    created = {name: memory.created(f"/bucket/run/step_1/{name}") for name in ("manifest.json", "model/weights")}
    assert created["manifest.json"] > created["model/weights"]
    memory.rm("/bucket", recursive=True)


def test_what_cannot_be_uploaded_is_tried_again_and_then_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("a file where a folder should be")
    said: list[str] = []
    uploader = Uploader(f"file://{tmp_path}/there", said.append, retry_after=(0.01,) * 400)
    uploader.submit(folder, "step_1")
    (tmp_path / "there").unlink()  # well before the last attempt
    assert wait_for(tmp_path / "there" / "step_1" / "manifest.json")
    uploader.close()
    (tmp_path / "no").write_text("")
    uploader = Uploader(f"file://{tmp_path}/no", said.append, retry_after=(0.01,))
    uploader.submit(folder, "step_1")
    uploader.close()
    assert len(said) == 1 and "Could not upload" in said[0] and "The local copy is whole" in said[0]
    assert check_manifest(folder) is None


def wait_for(path: Path) -> bool:
    pause = threading.Event()
    return any(path.exists() or pause.wait(0.01) for _ in range(3000))


def test_unknown_places_are_named() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.upload = 'nowhere://x'.*fsspec"):
        Uploader("nowhere://x", print)


# Saves a good checkpoint, then one that the system cuts off in the middle, as a full disk does.
FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from vlkit.errors import CheckpointError
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.training.checkpoint import take_snapshot, write_snapshot

text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
encoder = build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
named = [(name, value) for name, value in encoder.named_parameters()]
group = {"params": [value for _, value in named], "names": [name for name, _ in named]}
optimizer = torch.optim.AdamW([group])
for _, value in named:
    value.grad = torch.ones_like(value)
optimizer.step()
run = Path(sys.argv[1])
write_snapshot(run, take_snapshot(1, encoder, optimizer, torch.nn.Module(), {}), encoder)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
snapshot = take_snapshot(2, encoder, optimizer, torch.nn.Module(), {})
for limit in (100, 200_000, 8_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_snapshot(run, snapshot, encoder)
    except CheckpointError as error:
        print("refused", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
def test_a_full_disk_never_harms_the_last_good_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("refused Cannot write") == 3, done.stdout
    assert latest_good(tmp_path) == (checkpoint_folder(tmp_path, 1), [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert len(checkpoints(tmp_path)) == 1
