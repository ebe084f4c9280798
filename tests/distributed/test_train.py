"""`torchrun ... vlkit train` ends with the weights of one process, up to the order of sums; and says what cannot be."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

VLKIT = "from vlkit.cli import main; main()"
WORDS = ("red", "green", "blue", "white", "black", "gray", "pink", "orange")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A tiny ViT on 24 pictures with two captions each, both losses, duplicates left out."""
    (tmp_path / "shards").mkdir()
    pixels = np.random.default_rng(0)
    with tarfile.open(tmp_path / "shards" / "00000.tar", "w") as tar:
        for i in range(24):
            picture = io.BytesIO()
            Image.fromarray(pixels.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(picture, "PNG")
            captions = f"a {WORDS[i % 8]} thing\nnumber {i} in {WORDS[(i + 3) % 8]}"
            for suffix, content in (("png", picture.getvalue()), ("txt", captions.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    settings: dict[str, Any] = {
        "run": {"out": "out", "steps": 4, "seed": 3, "device": "cpu"},
        "model": {"architecture": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}},
        "data": {"train": str(tmp_path / "shards"), "global_batch_size": 8, "captions_per_image": 2, "workers": 0},
        "loss": {"clip": {"weight": 0.5, "duplicates": "mask"}, "sigmoid": 1.0},
        # A large eps: Adam turns the rounding errors of gradients that are really zero into full steps otherwise.
        "optim": {"lr": 1e-2, "eps": 1e-2, "clip_norm": 1.0, "warmup": 2},
        "checkpoint": {"every": "2 steps"},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings))
    return path


def torchrun(run_file: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    changes = [word for override in overrides for word in ("--set", override)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [*launch, sys.executable, "-c", VLKIT, "train", str(run_file), *changes],
        cwd=run_file.parent,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(
    run_file: Path, call_vlkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(run_file.parent)
    assert call_vlkit("train", run_file, "--set", "run.out=one").code == 0
    for out, overrides in (("two", []), ("chunks", ["data.chunk_size=2"])):
        done = torchrun(run_file, f"run.out={out}", *overrides)
        assert done.returncode == 0, done.stderr[-3000:]
        one, two = (
            load_file(run_file.parent / name / "model" / "open_clip_model.safetensors") for name in ("one", out)
        )
        assert one.keys() == two.keys()
        differing = {name: (one[name] - two[name]).abs().max().item() for name in one}
        assert max(differing.values()) < 1e-5, differing
        steps = [
            [json.loads(line) for line in (run_file.parent / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", out)
        ]
        for a, b in zip(*steps, strict=True):
            assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share(run_file: Path) -> None:
    done = torchrun(run_file, "data.global_batch_size=7")
    assert done.returncode != 0
    assert "2 processes. Use a multiple of 2." in done.stderr
