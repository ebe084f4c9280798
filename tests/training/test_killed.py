"""Runs killed with SIGKILL at random moments, also while a checkpoint is written in the background. Each test starts
one process that imports open_clip once (it takes seconds) and forks a child for every run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A model of two small towers, and what both scripts do with it.
COMMON = """
import json
import os
import random
import signal
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path


def write_shards(folder):
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for shard, numbers in enumerate(np.array_split(np.arange(40), 3)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in numbers.tolist():
                picture = BytesIO()
                Image.fromarray(pixels.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("txt", f"thing {i}\\nnumber {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


def settings(folder, out, vision, workers=0, steps=30):
    from vlkit.config import load_run

    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return load_run({
        "run": {"out": str(folder / out), "steps": steps, "device": "cpu"},
        "model": {"architecture": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}},
        "data": {"train": str(folder / "shards"), "global_batch_size": 8, "workers": workers,
                 "augment": {"crop_scale": [0.5, 1.0], "hflip": 0.5}},
        "optim": {"lr": 1e-2, "clip_norm": 1.0, "ema": 0.9},
        "checkpoint": {"every": "3 steps"},
    })
"""

# Trains without and with kills: after a random step, a random part of a step later; or while a checkpoint is written.
KILLED = """
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}


def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child


def train(folder, out, workers=0, resume=False):
    from vlkit.training.pretrain import pretrain

    pretrain(settings(folder, out, RESNET, workers), resume=resume, say=print)


def num_lines(path):
    return len(path.read_text().splitlines()) if path.is_file() else 0


def kill_at_random(child, out, chance, inside_save):
    step = num_lines(out / "metrics.jsonl") + chance.randint(2, 9)
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False  # it was done before
        writing = any((out / "checkpoints").glob(".step_*"))
        if num_lines(out / "metrics.jsonl") >= step and (writing or not inside_save):
            break
        time.sleep(0.0005)
    time.sleep(chance.random() * (0.004 if inside_save else 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main(folder, num_kills, seed):
    import matplotlib.figure
    import open_clip

    import vlkit.training.pretrain

    chance = random.Random(seed)
    write_shards(folder / "shards")
    assert os.waitpid(in_child(lambda: train(folder, "whole")), 0)[1] == 0
    killed = 0
    for attempt in range(num_kills):
        workers = 2 * (attempt % 2)
        child = in_child(lambda: train(folder, "killed", workers, resume=True))
        if not kill_at_random(child, folder / "killed", chance, inside_save=attempt % 3 == 2):
            break
        killed += 1
    child = in_child(lambda: train(folder, "killed", 2, resume=True))
    assert os.waitpid(child, 0)[1] == 0
    lines = [[json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
             for out in ("whole", "killed")]
    assert [line["step"] for line in lines[1]] == list(range(1, 31))
    differing = [a["step"] for a, b in zip(*lines) if (a["loss"], a["grad_norm"]) != (b["loss"], b["grad_norm"])]
    assert not differing, f"other losses in the steps {differing}"
    for model in ("model", "model_ema"):
        weights = [(folder / out / model / "open_clip_model.safetensors").read_bytes() for out in ("whole", "killed")]
        assert weights[0] == weights[1], f"the weights of {model} differ"
    assert not list((folder / "killed" / "checkpoints").glob(".step_*"))
    print("killed", killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


def run_script(script: str, folder: Path, *arguments: object) -> str:
    path = folder / "script.py"
    path.write_text(COMMON + script)
    command = [sys.executable, str(path), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    assert "killed 1" in run_script(KILLED, tmp_path, tmp_path / "runs", 1, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_twenty_kills(tmp_path: Path) -> None:
    for seed in range(5):
        said = run_script(KILLED, tmp_path, tmp_path / f"runs{seed}", 4, seed)
        assert "killed" in said
