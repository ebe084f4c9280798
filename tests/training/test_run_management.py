"""What happens to a run: signals, a full disk, no memory, a loss that is no number, another writer, uploads."""

import errno
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from vlkit.config import RunConfig, load_run
from vlkit.errors import CheckpointError, ConfigError
from vlkit.models.saved import check_manifest
from vlkit.settings import Duration
from vlkit.training.checkpoint import checkpoints
from vlkit.training.folder_lock import FolderLock
from vlkit.training.loop import Every, Moment, NonFiniteError
from vlkit.training.pretrain import is_out_of_memory, pretrain

STEPS = 8


def files_of(count: int) -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(0)
    for i in range(count):
        picture = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(picture, "PNG")
        yield f"{i:06d}.png", picture.getvalue()
        yield f"{i:06d}.txt", f"thing number {i}".encode()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    return write_tar(tmp_path_factory.mktemp("data") / "00000.tar", files_of(24)).parent


@pytest.fixture
def make_run(shards: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    run: dict[str, Any] = {
        "run": {"out": str(tmp_path / "out"), "steps": STEPS, "seed": 3, "device": "cpu"},
        "model": {"architecture": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}},
        "data": {"train": str(shards), "global_batch_size": 8, "workers": 0},
        "optim": {"lr": 1e-3, "warmup": 2},
        "checkpoint": {"every": "3 steps"},
    }
    return lambda *overrides: load_run(run, overrides)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out)]


def weights(out: Path) -> bytes:
    return (out / "model" / "open_clip_model.safetensors").read_bytes()


def test_what_is_measured(make_run: Callable[..., RunConfig]) -> None:
    out = pretrain(make_run("run.steps=10", "run.peak_tflops=0.5", "checkpoint.in_background=false"))
    lines = steps_of(out)
    assert all(line["peak_memory"] > 2**20 and line["tflops"] > 0 for line in lines)
    assert lines[3]["mfu"] == pytest.approx(lines[3]["tflops"] / 0.5)
    sometimes = {"contrastive_accuracy", "param_norm", "update_norm"}
    assert [sometimes & line.keys() for line in lines] == [set()] * 9 + [sometimes]
    assert 0 < lines[9]["update_norm"] < 0.1 * lines[9]["param_norm"]
    page = (out / "summary.html").read_text()
    assert page.count("<img ") >= 5 and "temperature" in page


def test_in_the_background_or_not_is_the_same(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    one = pretrain(make_run("checkpoint.every=1"))
    two = pretrain(make_run("checkpoint.every=1", "checkpoint.in_background=false", f"run.out={tmp_path / 'two'}"))
    assert weights(one) == weights(two)
    for name in names(one):
        assert check_manifest(one / "checkpoints" / name) is None
        kept = [load_file(out / "checkpoints" / name / "optimizer.safetensors") for out in (one, two)]
        assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_a_checkpoint_on_request(make_run: Callable[..., RunConfig]) -> None:
    asked = iter([False, True] + [False] * 20)
    out = pretrain(make_run("checkpoint.every=100", "checkpoint.keep_last=9"), save_now=lambda: next(asked))
    assert names(out) == ["step_00000002", f"step_{STEPS:08d}"]


def test_copies_go_to_the_url(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    out = pretrain(make_run(f"checkpoint.upload=file://{tmp_path / 'there'}", "checkpoint.keep_last=9"))
    there = tmp_path / "there"
    assert names(there) == names(out) and len(names(out)) == 3
    assert [check_manifest(path) for path in [*checkpoints(there), there / "model"]] == [None] * 4
    assert steps_of(there) == steps_of(out)
    with pytest.raises(ConfigError, match=r"checkpoint\.upload"):
        pretrain(make_run("checkpoint.upload=nowhere://x", f"run.out={tmp_path / 'other'}"))


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    from vlkit.models import saved

    swap, calls = saved._swap, iter(range(100))

    def full(new: Path, target: Path) -> None:
        if target.name == "step_00000006":
            raise OSError(errno.ENOSPC, "No space left on device")
        next(calls)
        swap(new, target)

    monkeypatch.setattr(saved, "_swap", full)  # where the system would say it
    run = make_run(f"checkpoint.in_background={background}")
    with pytest.raises(CheckpointError, match=r"step_00000006: No space left on device"):
        pretrain(run)
    out = Path(run.run.out)
    assert names(out) == ["step_00000003"] and not list((out / "checkpoints").glob(".*"))
    monkeypatch.undo()
    pretrain(run, resume=True)
    whole = make_run(f"run.out={out.parent / 'whole'}")
    assert weights(pretrain(whole)) == weights(out)


def test_a_folder_has_one_writer(make_run: Callable[..., RunConfig]) -> None:
    run = make_run()
    lock = FolderLock(Path(run.run.out))
    with pytest.raises(CheckpointError, match="is being written by"):
        pretrain(run)
    lock.release()
    pretrain(run)


def test_another_loss_is_not_continued(make_run: Callable[..., RunConfig]) -> None:
    pretrain(make_run("run.steps=2", "optim.warmup=1"))
    with pytest.raises(CheckpointError, match=r'loss\.clip\.duplicates: "keep" -> "mask"'):
        pretrain(make_run('loss.clip={duplicates="mask"}'), resume=True)


class Allocation(nn.Module):
    """Stands where a tower is and asks for more memory than there is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**55)


def test_out_of_memory_names_what_to_lower(make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    from vlkit.training import assemble

    build = assemble.build_learner

    def too_large(*arguments: Any) -> Any:
        learner = build(*arguments)
        learner.module.encoder.register_forward_pre_hook(lambda module, given: Allocation()(given))
        return learner

    monkeypatch.setattr(assemble, "build_learner", too_large)
    with pytest.raises(ConfigError) as raised:
        pretrain(make_run("data.chunk_size=4"))
    message = str(raised.value)
    told = ("4 images at a time", "data.chunk_size = 2", "batch of 8", "loss.clip.tile_size", "data.global_batch_size")
    assert [words for words in told if words not in message] == []


def test_kinds_of_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def break_weights(at: int) -> Every:
    """Makes the loss no number in the step after `at`, once."""
    left = [at]

    def act(moment: Moment) -> None:
        if moment.step in left:
            left.remove(moment.step)
            next(moment.encoder.parameters()).data.fill_(float("nan"))

    return Every(Duration(1, "steps"), act, reads_encoder=False)


def test_a_rewind_goes_back_and_leaves_the_data_out(make_run: Callable[..., RunConfig]) -> None:
    said: list[str] = []
    seen: list[str] = []
    note = Every(Duration(1, "steps"), lambda moment: seen.append(moment.keys[0]), reads_encoder=False)
    out = pretrain(make_run("run.rewinds=1", "run.steps=9"), [break_weights(4), note], say=said.append)
    assert "Back to step 3 of step_00000003; 2 batches from there on are left out (1 of 1 times)." in said[1]
    assert [line["step"] for line in steps_of(out)] == list(range(1, 10))
    state = json.loads((checkpoints(out)[-1] / "state.json").read_text())
    assert (state["skipped"], state["rewinds"]) == (2, 1)
    # Steps 1 to 4, then from 4 on with the batches of steps 6, 7, ... of an undisturbed run.
    undisturbed: list[str] = []
    note = Every(Duration(1, "steps"), lambda moment: undisturbed.append(moment.keys[0]), reads_encoder=False)
    pretrain(make_run("run.steps=11", f"run.out={out.parent / 'other'}"), [note])
    assert seen == undisturbed[:4] + undisturbed[5:]


def test_a_rewind_is_continued_where_it_was(make_run: Callable[..., RunConfig]) -> None:
    run = make_run("run.rewinds=1", "run.steps=9")
    whole = pretrain(run, [break_weights(4)], say=print)
    kept = weights(whole)
    for name in names(whole)[-1:]:
        shutil.rmtree(whole / "checkpoints" / name)  # as if it had been killed before its end
    shutil.rmtree(whole / "model")
    pretrain(run, resume=True, say=print)
    assert weights(whole) == kept


def test_without_rewinds_it_stops(make_run: Callable[..., RunConfig]) -> None:
    run = make_run()
    with pytest.raises(NonFiniteError, match=r"in step 5.*--resume"):
        pretrain(run, [break_weights(4)], say=print)
    with pytest.raises(NonFiniteError):  # none is left of one
        pretrain(make_run("run.rewinds=1", f"run.out={run.run.out}2"), [break_weights(4), break_weights(5)], say=print)
    with pytest.raises(NonFiniteError):  # nowhere to go back to
        pretrain(make_run("run.rewinds=1", f"run.out={run.run.out}3"), [break_weights(1)], say=print)
