"""Two processes, with DDP and FSDP, with and without chunks, train the weights of one, up to the order of sums; what
one layout has saved, another continues; evaluations shared by processes give the numbers of one.

All runs of two processes happen inside one torchrun; see train_ranks.py.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
WORDS = ("red", "green", "blue", "white", "black", "gray", "pink", "orange")
STEPS = 6


def files_of(count: int) -> Iterator[tuple[str, bytes]]:
    """Pictures with two captions each."""
    pixels = np.random.default_rng(0)
    for i in range(count):
        picture = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(picture, "PNG")
        yield f"{i:06d}.png", picture.getvalue()
        yield f"{i:06d}.txt", f"a {WORDS[i % 8]} thing\nnumber {i} in {WORDS[(i + 3) % 8]}".encode()


def write_photographs(folder: Path) -> None:
    """12 photographs in class folders, and with an object each in COCO's form."""
    pixels = np.random.default_rng(1)
    (folder / "annotations").mkdir(parents=True)
    images, things = [], []
    for i in range(12):
        name = f"{i:012d}.png"
        for place in (folder / "classes" / WORDS[i % 3], folder / "val2017"):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(place / name)
        images.append({"id": i, "file_name": name, "height": 40, "width": 56})
        shape = [[0, 0, 20 + 2 * i, 0, 20 + 2 * i, 30, 0, 30]]
        things.append({"id": i, "image_id": i, "category_id": i % 3, "bbox": [0, 0, 20 + 2 * i, 30], "iscrowd": 0,
                       "area": 600 + 60 * i, "segmentation": shape})  # fmt: skip
    categories = [{"id": n, "name": WORDS[n]} for n in range(3)]
    content = {"images": images, "annotations": things, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Those that embed images, embed texts, look at patches, or train something of their own."""
    classes, scenes = str(folder / "photographs" / "classes"), str(folder / "photographs")
    chosen = [
        ("retrieval", str(folder / "shards"), {}),
        ("text-similarity", str(folder / "shards"), {}),
        ("classification", classes, {"templates": "photo"}),
        ("knn", classes, {"k": [1, 3]}),
        ("probe", classes, {}),
        ("segmentation", scenes, {"templates": "photo"}),
        ("pointing", scenes, {"method": "patches"}),
        ("explanation", scenes, {"method": "legrad"}),
        ("vocabulary-free", classes, {"captions": str(folder / "shards")}),
    ]
    return [
        {"name": name, "data": data, "options": options, "every": f"{2 + place % 2} steps"}
        for place, (name, data, options) in enumerate(chosen)
    ]


def settings(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    """A tiny ViT, both losses, duplicates left out, averaged weights."""
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    data = {"train": str(folder / "shards"), "global_batch_size": 8, "captions_per_image": 2, "workers": 0}
    return {
        "run": {"out": str(folder / out), "steps": STEPS, "seed": 3, "device": "cpu", **changes.pop("run", {})},
        "model": {
            "architecture": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
            **changes.pop("model", {}),
        },
        "data": {**data, **changes.pop("data", {})},
        "loss": {"clip": {"weight": 0.5, "duplicates": "mask"}, "sigmoid": 1.0},
        # A large eps: Adam turns the rounding errors of gradients that are really zero into full steps otherwise.
        "optim": {"lr": 1e-2, "eps": 1e-2, "clip_norm": 1.0, "warmup": 2, "ema": 0.9},
        "checkpoint": {"every": "2 steps"},
        "eval": [{"name": "retrieval", "data": str(folder / "shards"), "every": "3 steps"}],
        **changes,
    }


def adapted(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    """LoRA beside averaged weights, with patch dropout and a first stage of small images and short texts."""
    model = {"lora": {"rank": 2, "alpha": 32, "targets": ["q", "v", "mlp"]}, "patch_dropout": 0.25}
    stages = [{"length": 4, "image_size": 16, "text_length": 6}, {}]
    return settings(folder, out, model={**model, "patch_dropout_tail": 1}, stages=stages, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    """Run folders of one and of two processes."""
    from eval.in_training import make_every
    from vlkit.config import load_run
    from vlkit.training.pretrain import pretrain

    folder = tmp_path_factory.mktemp("runs")
    write_tar(folder / "shards" / "00000.tar", files_of(24))
    write_photographs(folder / "photographs")
    # Steps too small for float32: both trainings keep the very same weights, so that a hit is a hit in both.
    many = {"eval": evaluations(folder), "optim": {"lr": 1e-30}, "checkpoint": {"every": f"{STEPS} steps"}}
    fsdp = {"parallel": "fsdp"}
    pairs = [
        (settings(folder, "ddp"), False, 0),
        (settings(folder, "fsdp", run=fsdp), False, 0),
        (settings(folder, "chunks", run=fsdp, data={"chunk_size": 2}), False, 0),
        (settings(folder, "mixed", run=fsdp), False, 3),
        (settings(folder, "mixed"), True, 5),
        (settings(folder, "mixed", run=fsdp), True, 0),
        (settings(folder, "stopped", run=fsdp), False, 3),
        (settings(folder, "many", **many), False, 0),
        (adapted(folder, "adapted", run=fsdp), False, 3),
        (adapted(folder, "adapted"), True, 5),
        (adapted(folder, "adapted", run=fsdp), True, 0),
        (settings(folder, "odd", data={"global_batch_size": 7}), False, 0),
    ]
    runs = [{"settings": run, "resume": resume, "stop": stop} for run, resume, stop in pairs]
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "train_ranks.py"), str(folder / "runs.json")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run = load_run(settings(folder, "one"))
    pretrain(run, every=make_every(run))
    run = load_run(settings(folder, "many_one", **many))
    pretrain(run, every=make_every(run))
    run = load_run(adapted(folder, "one_adapted"))
    pretrain(run, every=make_every(run))
    shutil.copytree(folder / "stopped", folder / "continued")
    run = load_run(settings(folder, "continued"))
    pretrain(run, every=make_every(run), resume=True)
    return folder


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a: Path, b: Path) -> float:
    one, two = (load_file(path / "open_clip_model.safetensors") for path in (a, b))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


# "mixed" went from FSDP to DDP and back, "continued" from FSDP on two processes to one.
@pytest.mark.parametrize("name", ["ddp", "fsdp", "chunks", "mixed", "continued"])
def test_the_weights_are_those_of_one_process(folder: Path, name: str) -> None:
    for model in ("model", "model_ema"):
        assert largest_difference(folder / "one" / model, folder / name / model) < 1e-5
    assert largest_difference(folder / "one" / "model", folder / "one" / "model_ema") > 1e-4
    for a, b in zip(steps_of(folder / "one"), steps_of(folder / name), strict=True):
        assert a["step"] == b["step"]
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


def test_lora_averages_and_stages_are_those_of_one_process(folder: Path) -> None:
    """Saved by FSDP in the first stage, by DDP in the second, and resumed by the other one."""
    for model in ("model", "model_ema"):
        assert largest_difference(folder / "one_adapted" / model, folder / "adapted" / model) < 1e-5
    assert largest_difference(folder / "adapted" / "model", folder / "adapted" / "model_ema") > 1e-4
    lines = [steps_of(folder / name) for name in ("one_adapted", "adapted")]
    for a, b in zip(*lines, strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)
    state = load_file(folder / "adapted" / "checkpoints" / f"step_{STEPS:08d}" / "optimizer.safetensors")
    trained = {name.rpartition("|")[0] for name in state if name.startswith("optimizer.")}
    assert {".up." in name or ".down." in name for name in trained if "logit" not in name} == {True}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_shared_evaluations_give_the_numbers_of_one_process(folder: Path, name: str) -> None:
    ours, theirs = ([line["eval"] for line in steps_of(folder / run) if "eval" in line] for run in (name, "one"))
    assert len(ours) == 2 and len(ours[0]) >= 6
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b)


def test_every_kind_of_evaluation_is_shared_at_its_own_cadence(folder: Path) -> None:
    ours, theirs = ([line for line in steps_of(folder / run) if "eval" in line] for run in ("many", "many_one"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [2, 3, 4, 6]
    written = set(ours[-1]["eval"])
    for key in ("text_to_image/recall@1", "accuracy@1", "knn/accuracy@1/3_neighbours", "probe/accuracy@1",
                "segmentation/mean_iou", "pointing/hits", "explanation/deletion", "text-similarity/cmc@1",
                "vocabulary-free/semantic_similarity"):  # fmt: skip
        assert key in written, key
    for a, b in zip(ours, theirs, strict=True):
        assert a["eval"] == pytest.approx(b["eval"], abs=1e-5)


def test_checkpoints_are_whole_whatever_the_layout(folder: Path) -> None:
    state, weights = (
        load_file(folder / "fsdp" / "checkpoints" / f"step_{STEPS:08d}" / name)
        for name in ("optimizer.safetensors", "model/open_clip_model.safetensors")
    )
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    (moment,) = (value for key, value in state.items() if name in key and key.endswith("|exp_avg"))
    assert moment.shape == weights[name].shape == (128, 32)
    record = json.loads((folder / "fsdp" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    assert record["processes"] == 2 and len(record["random"]) == 2


def test_a_batch_that_the_processes_cannot_share(folder: Path) -> None:
    said = json.loads((folder / "said.json").read_text())
    assert "2 processes. Use a multiple of 2." in said.pop()
    assert said == [""] * len(said)
