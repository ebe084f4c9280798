"""`vlkit train` as it is called: a run, its continuation, its plan, and what it says about mistakes."""

import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlkit.config import load_run
from vlkit.configs import shipped_runs
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder

SMALL_VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

RUN = """
[run]
out = "{folder}/out"
steps = 6
device = "cpu"

[model.architecture]
embed_dim = 16
vision_cfg = {{ image_size = 16, layers = 1, width = 32, head_width = 16, patch_size = 8 }}
text_cfg = {{ context_length = 16, vocab_size = 49408, width = 32, heads = 2, layers = 1 }}

[data]
train = "{folder}/shards"
val = "{folder}/shards/00000.tar"
global_batch_size = 8
workers = 0

[[eval]]
name = "retrieval"
every = "3 steps"

[checkpoint]
every = "3 steps"
"""


def files_of(shard: int) -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(shard)
    for i in range(10):
        picture = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(picture, "PNG")
        yield f"{shard}{i:05d}.png", picture.getvalue()
        yield f"{shard}{i:05d}.txt", f"thing {shard} {i}".encode()


@pytest.fixture
def run_file(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    for shard in range(2):
        write_tar(tmp_path / "shards" / f"{shard:05d}.tar", files_of(shard))
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


def test_a_run_its_continuation_and_a_second_start(run_file: Path, call_vlkit: Callable[..., Any]) -> None:
    done = call_vlkit("train", run_file, "--set", "optim.lr=3e-3", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    out = run_file.parent / "out"
    assert result["model"] == f"run:{out}" and result["step"] == 6
    assert result["eval"]["text_to_image/recall@10"] == 1.0  # ten images, ten texts
    assert "step 1/6  loss " in done.err and "temperature 0.07" in done.err
    assert "step 6/6" in done.err and "samples/s" in done.err and "data wait" in done.err and "left 0:00" in done.err
    assert "step 3: image_to_text/recall@1" in done.err
    assert json.loads((out / "config.json").read_text())["optim"]["lr"] == 3e-3

    again = call_vlkit("train", run_file)
    assert again.code == 1 and "holds a run already" in again.err and "--resume" in again.err

    longer = call_vlkit("train", run_file, "--set", "run.steps=8", "--resume")
    assert longer.code == 0
    assert "Continuing with other settings" in longer.err and "run.steps: 6 -> 8" in longer.err
    assert "Training is complete" in longer.out and "step" in longer.out
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(run_file: Path, call_vlkit: Callable[..., Any], number: int) -> None:
    out = run_file.parent / "out"
    before = signal.getsignal(number)
    sender = threading.Thread(target=signal_after_two_steps, args=(out / "metrics.jsonl", number))
    sender.start()
    stopped = call_vlkit("train", run_file, "--set", "run.steps=5000", "--set", "eval=[]", "--set", "data.val=x.tar")
    sender.join()
    assert stopped.code == 128 + number, stopped.err
    said = re.search(r"Stopped after step (\d+) of 5000, with a checkpoint\. --resume continues\.", stopped.err)
    assert said is not None
    assert "data.val has no effect" in stopped.err
    assert (out / "checkpoints" / f"step_{int(said[1]):08d}").is_dir() and not (out / "model").exists()
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no SIGUSR1")
def test_sigusr1_saves_and_training_goes_on(run_file: Path, call_vlkit: Callable[..., Any]) -> None:
    out = run_file.parent / "out"

    def send() -> None:
        signal_after_two_steps(out / "metrics.jsonl", signal.SIGUSR1)
        while not list((out / "checkpoints").glob("step_*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    settings = ("run.steps=50000", "eval=[]", "data.val=x.tar", "checkpoint.every=50000")
    stopped = call_vlkit("train", run_file, *(word for setting in settings for word in ("--set", setting)))
    sender.join()
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert len(steps) == 2
    assert len((out / "metrics.jsonl").read_text().splitlines()) == int(steps[1].removeprefix("step_"))


def signal_after_two_steps(metrics: Path, number: int) -> None:
    while not metrics.is_file() or metrics.read_text().count("\n") < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_a_plan_is_printed_and_nothing_written(run_file: Path, call_vlkit: Callable[..., Any]) -> None:
    plan = call_vlkit("train", run_file, "--dry-run", "--resume", "--set", "eval.0.data=nowhere")
    assert plan.code == 0, plan.err
    for words in ("parameters, image", "20 samples in 2 shards", "steps per epoch", "memory, activations", "cosine"):
        assert words in plan.out
    assert "retrieval" in plan.out and "nowhere" in plan.out
    assert "--resume has no effect with --dry-run." in plan.err
    assert not (run_file.parent / "out").exists()


@pytest.mark.parametrize("name", shipped_runs())
def test_every_shipped_run_has_a_plan(
    name: str, call_vlkit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)
    given = ["--set", "data.global_batch_size=4"]
    if load_run(name).model.init is not None:  # a model to start from, which is not on this disk
        given += ["--set", f"model.init=local-dir:{save_encoder(build_encoder(SMALL_VIT), tmp_path / 'model')}"]
    done = call_vlkit("train", name, "--dry-run", "--json", *given)
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["parameters"]["image"]["total"] > 0 and plan["parameters"]["text"]["total"] > 0
    assert plan["memory"]["rows_measured"] == 4 and plan["loss"] > 0
    problem = plan["data"]["problem"]
    assert "No shard at" in problem or "shards are missing" in problem
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.toml"], "No run file nothing.toml"),
        (["demoo"], "Did you mean demo?"),
        (["{run}", "--set", "optim.lrr=1"], "optim.lrr: unknown key. Did you mean lr?"),
        (["{run}", "--set", 'optim.lr="x"', "--set", "run.seed=-1"], "has 2 problems:"),
        (["{run}", "--set", "data.train=nowhere", "--set", "eval=[]"], "No shard at nowhere"),
        (["{run}", "--set", "eval.0.data=nowhere"], "nowhere"),
        (["{run}", "--set", "model.architecture.embed=3"], "embed"),
    ],
)
def test_mistakes_end_with_one_message(
    run_file: Path, call_vlkit: Callable[..., Any], arguments: list[str], message: str
) -> None:
    done = call_vlkit("train", *(argument.replace("{run}", str(run_file)) for argument in arguments))
    assert done.code == 1
    assert "vlkit: " in done.err and message in done.err
    assert done.out == ""
    assert not (run_file.parent / "out").exists()
