"""Pretraining on tiny shards: it learns, it can be interrupted anywhere, and it refuses what does not fit.

The image tower is a small ResNet: batch statistics and channels-last weights are part of what must survive.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlkit.config import RunConfig, load_run
from vlkit.errors import CheckpointError, ConfigError, DataError, VlkitError
from vlkit.settings import Duration
from vlkit.training.checkpoint import checkpoints, latest_good
from vlkit.training.loop import Every, Moment, NonFiniteError
from vlkit.training.pretrain import pretrain

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
COLOURS = ("red", "green", "blue", "white", "black", "gray", "pink", "orange")
STEPS = 9


def files_of(numbers: list[int], pixels: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for i in numbers:
        picture = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(picture, "PNG")
        first = f"a {COLOURS[i % 8]} thing beside a {COLOURS[i // 8 % 8]} one"
        yield f"{i:06d}.png", picture.getvalue()
        yield f"{i:06d}.txt", f"{first}\nnumber {i} in {COLOURS[(i + 3) % 8]}".encode()


@pytest.fixture(scope="module")
def write_shards(write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """`write_shards(folder, num_samples=16)`: noise and two captions each."""

    def write(folder: Path, num_samples: int = 40, num_shards: int = 3, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed)
        for shard, numbers in enumerate(np.array_split(np.arange(num_samples), num_shards)):
            write_tar(folder / f"{shard:05d}.tar", files_of(numbers.tolist(), pixels))
        return folder

    return write


def settings(shards: Path, out: Path, *overrides: str) -> RunConfig:
    run: dict[str, Any] = {
        "run": {"out": str(out), "steps": STEPS, "seed": 3, "device": "cpu"},
        "model": {"architecture": {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT}},
        "data": {
            "train": str(shards),
            "global_batch_size": 8,
            "captions_per_image": 2,
            "workers": 0,
            "augment": {"crop_scale": [0.5, 1.0], "hflip": 0.5},
        },
        "optim": {"lr": 1e-2, "clip_norm": 1.0, "warmup": 2},
        "checkpoint": {"every": "4 steps", "keep_last": 3},
    }
    return load_run(run, overrides)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., Path]) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def make_run(shards: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *overrides: settings(shards, tmp_path / "out", *overrides)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return pretrain(settings(shards, out), every=[Every(Duration(4, "steps"), disturb)])


def disturb(moment: Moment) -> dict[str, float]:
    """An evaluation that draws random numbers, as one might."""
    assert not moment.encoder.training
    return {"drawn": torch.rand(3).mean().item()}


def stop_after(step: int) -> Callable[[], bool]:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) == step


def model(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "open_clip_model.safetensors")


def assert_same_model(a: Path, b: Path) -> None:
    first, second = model(a), model(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_it_should(whole: Path, shards: Path) -> None:
    assert [path.name for path in checkpoints(whole)] == ["step_00000004", "step_00000008", "step_00000009"]
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints",
        "model",
        "config.json",
        "data.jsonl",
        "metrics.jsonl",
        "loss.png",
        "summary.html",
        "writer.lock",
    }
    assert load_run(whole / "config.json") == settings(shards, whole)
    with Image.open(whole / "loss.png") as curve:
        assert curve.size[0] > 300
    lines = steps_of(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    first = lines[0]
    assert (first["samples"], first["epoch"], first["lr"]) == (8, 0.2, 0.005)
    assert first["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    assert first["parts"] == {"clip": first["loss"]} and first["grad_norm"] > 0
    assert 0 <= first["data_wait"] <= 1 and first["samples_per_second"] > 0
    assert [line["step"] for line in lines if "eval" in line] == [4, 8, 9]


def test_the_trained_model_loads_by_its_run_folder(whole: Path) -> None:
    from vlkit.models.load import load_embedder

    embedder = load_embedder(f"run:{whole}")
    assert embedder.embed_texts(["a red thing"]).shape == (1, 16)
    assert embedder.logit_scale == pytest.approx(steps_of(whole)[-1]["logit_scale"], rel=0.05)


def test_the_state_of_a_checkpoint(whole: Path, shards: Path) -> None:
    from vlkit.data.shard_index import ShardSet

    state = json.loads((checkpoints(whole)[0] / "state.json").read_text())
    assert state["step"] == 4 and state["samples"] == 32
    assert state["identity"]["data"] == {"fingerprint": ShardSet.open(shards).fingerprint, "num_samples": 40}
    assert state["config"]["optim"]["lr"] == 0.01
    assert [{"torch", "numpy", "python"}] == [states.keys() for states in state["random"]]  # of each process
    assert {"vlkit", "torch", "numpy", "python"} == state["versions"].keys()


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_is_bit_identical(make_run: Callable[..., RunConfig], whole: Path, workers: int) -> None:
    said: list[str] = []
    out = pretrain(make_run(), [Every(Duration(4, "steps"), disturb)], stop=stop_after(6), say=said.append)
    assert said == ["Stopped after step 6 of 9, with a checkpoint. --resume continues."]
    assert not (out / "model").exists()
    torch.manual_seed(99)  # a new process would not be where this one is
    pretrain(make_run(f"data.workers={workers}"), [Every(Duration(4, "steps"), disturb)], resume=True, say=said.append)
    assert len(said) == 1
    assert_same_model(out, whole)
    ours, theirs = steps_of(out), steps_of(whole)
    for name in ("step", "loss", "grad_norm", "lr", "logit_scale"):
        assert [line[name] for line in ours] == [line[name] for line in theirs]


def test_muon_continues_to_the_bit(shards: Path, tmp_path: Path) -> None:
    muon = ("optim.name=muon", "optim.matrix_lr=0.03")
    through = pretrain(settings(shards, tmp_path / "through", *muon))
    stopped = settings(shards, tmp_path / "stopped", *muon)
    pretrain(stopped, stop=stop_after(5))
    assert_same_model(pretrain(stopped, resume=True), through)
    state = load_file(checkpoints(through)[-1] / "optimizer.safetensors")
    matrix = {name.rpartition("|")[2] for name in state if "mlp.c_fc.weight" in name}
    bias = {name.rpartition("|")[2] for name in state if "mlp.c_fc.bias" in name}
    assert matrix == {"step", "momentum"} and bias == {"step", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_cut_in_half_is_passed_over(make_run: Callable[..., RunConfig], whole: Path) -> None:
    out = Path(make_run().run.out)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    newest = checkpoints(out)[-1]
    weights = newest / "model" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    good, notes = latest_good(out)
    assert good == checkpoints(out)[-2]
    said: list[str] = []
    pretrain(make_run(), [Every(Duration(4, "steps"), disturb)], resume=True, say=said.append)
    assert said == notes
    assert "step_00000009 is damaged" in said[0] and "Continuing from step_00000008" in said[0]
    assert (out / "checkpoints" / "damaged_step_00000009").is_dir()
    assert_same_model(out, whole)
    assert [line["step"] for line in steps_of(out)] == list(range(1, STEPS + 1))


def test_a_changed_byte_is_found(make_run: Callable[..., RunConfig], whole: Path) -> None:
    out = Path(make_run().run.out)
    shutil.copytree(whole, out)
    state = checkpoints(out)[-1] / "optimizer.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    good, notes = latest_good(out)
    assert good is not None and good.name == "step_00000008" and "optimizer.safetensors differs" in notes[0]


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(make_run: Callable[..., RunConfig], whole: Path) -> None:
    said: list[str] = []
    out = pretrain(make_run(), [Every(Duration(4, "steps"), disturb)], resume=True, say=said.append)
    assert said == [f"There is no checkpoint to continue from in {out}: starting afresh."]
    assert_same_model(out, whole)


def test_a_folder_with_a_run_is_not_overwritten(whole: Path, shards: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a run already \(.*step_00000009, model\).*--resume"):
        pretrain(settings(shards, whole))


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("run.seed=4", "seed: 3 -> 4"),
        ("data.global_batch_size=10", "global_batch_size: 8 -> 10"),
        ("data.captions_per_image=1", "captions_per_image: 2 -> 1"),
        ("model.architecture.vision_cfg.width=16", "model.model_cfg.vision_cfg.width: 8 -> 16"),
        ("model.architecture.embed_dim=8", "model.model_cfg.embed_dim: 16 -> 8"),
    ],
)
def test_another_run_is_not_continued(whole: Path, shards: Path, override: str, difference: str) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run") as raised:
        pretrain(settings(shards, whole, override), resume=True)
    assert f"\n  {difference}\n" in str(raised.value)
    assert [path.name for path in checkpoints(whole)] == ["step_00000004", "step_00000008", "step_00000009"]


def test_changed_data_are_refused(whole: Path, tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    others = write_shards(tmp_path / "others", seed=1)
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: "):
        pretrain(settings(others, whole), resume=True)


def test_other_settings_are_continued_and_said(make_run: Callable[..., RunConfig], whole: Path) -> None:
    out = Path(make_run().run.out)
    shutil.copytree(whole, out)
    said: list[str] = []
    pretrain(make_run("run.steps=10", "optim.lr=0.02"), resume=True, say=said.append)
    assert said == [
        "Continuing with other settings than step_00000009 was saved with: optim.lr: 0.01 -> 0.02; run.steps: 9 -> 10."
    ]
    assert [line["step"] for line in steps_of(out)] == list(range(1, 11))


def test_what_is_kept(make_run: Callable[..., RunConfig]) -> None:
    values = iter([0.1, 0.9, 0.9, 0.5, 0.2])
    out = pretrain(
        make_run(
            "checkpoint.every=2",
            "checkpoint.keep_last=2",
            "checkpoint.keep_best=found",
            'eval=[{name="retrieval", data="x"}]',
        ),
        [Every(Duration(2, "steps"), lambda moment: {"found": next(values)})],
    )
    # Evaluated after 2, 4, 6, 8, 9: 4 is the first with the best value, 8 and 9 are the last two.
    assert [path.name for path in checkpoints(out)] == ["step_00000004", "step_00000008", "step_00000009"]


def test_a_best_metric_that_is_not_measured_is_said(make_run: Callable[..., RunConfig]) -> None:
    said: list[str] = []
    run = make_run(
        "run.steps=1", "optim.warmup=0", "checkpoint.keep_best=recall@1", 'eval=[{name="retrieval", data="x"}]'
    )
    pretrain(run, [Every(Duration(1, "steps"), lambda moment: {"recall@10": 1.0})], say=said.append)
    assert said == ["checkpoint.keep_best = 'recall@1': step 1 was evaluated without it. Did you mean recall@10?"]


def test_sixteen_pairs_are_learned_by_heart(tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    shards = write_shards(tmp_path / "shards", num_samples=16)
    overrides = ("run.steps=80", "data.global_batch_size=16", "data.augment=false", "data.captions_per_image=1")
    run = settings(shards, tmp_path / "out", *overrides, "optim.lr=3e-3", "checkpoint.every=1000")
    lines = steps_of(pretrain(run))
    assert lines[0]["loss"] > 2.5  # chance is log 16 = 2.8
    assert lines[-1]["loss"] < 0.2


def test_a_loss_that_is_no_number_names_the_batch(make_run: Callable[..., RunConfig]) -> None:
    run = make_run("optim.lr=1e30", "optim.warmup=0")
    said: list[str] = []
    with pytest.raises(NonFiniteError, match=r"with the samples 0000\d/0000\d\d, .*\(8 in all\)"):
        pretrain(run, say=said.append)
    written = json.loads((Path(run.run.out) / "nonfinite.json").read_text())
    assert len(written["keys"]) == len(written["ids"]) == 8 and written["step"] >= 2
    assert "nonfinite.json" in said[0]
    assert len(steps_of(Path(run.run.out))) == written["step"] - 1


def test_a_frozen_tower_keeps_its_weights_and_statistics(make_run: Callable[..., RunConfig]) -> None:
    from vlkit.models.open_clip_encoder import build_encoder

    run = make_run('model.freeze=["image"]', "run.steps=3")
    torch.manual_seed(run.run.seed)
    architecture = run.model.architecture
    assert architecture is not None
    before = build_encoder(architecture).weights()
    after = model(pretrain(run, [Every(Duration(1, "steps"), disturb)]))
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"text", "logit_scale"}


@pytest.mark.parametrize(("start", "held"), [(9, 100), (-3, 1)])
def test_the_temperature_is_held_in_its_bounds(make_run: Callable[..., RunConfig], start: int, held: int) -> None:
    run = make_run(f"model.architecture.init_logit_scale={start}", "optim.lr=1e-6", "run.steps=2")
    scales = [line["logit_scale"] for line in steps_of(pretrain(run))]
    assert scales == [pytest.approx(math.exp(start)), pytest.approx(held, rel=1e-5)]


def test_bf16_on_request(make_run: Callable[..., RunConfig]) -> None:
    out = pretrain(make_run("run.steps=2", "optim.precision=bf16"))
    fp32 = steps_of(pretrain(make_run("run.steps=2", f"run.out={out.parent / 'fp32'}")))
    bf16 = steps_of(out)
    assert bf16[0]["loss"] != fp32[0]["loss"]
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=0.05)
    assert {value.dtype for value in model(out).values()} <= {torch.float32, torch.int64}


def test_broken_samples_are_reported(tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    shards = write_shards(tmp_path / "shards", num_shards=1)
    tar = shards / "00000.tar"
    content = tar.read_bytes()
    place = content.index(b"\x89PNG", 5000)
    tar.write_bytes(content[:place] + b"broken!!" + content[place + 8 :])
    said: list[str] = []
    overrides = ("data.max_bad_fraction=0.2", "run.steps=5", "data.global_batch_size=8")
    pretrain(settings(shards, tmp_path / "out", *overrides), say=said.append)
    assert said[0].startswith("1 sample could not be read and left out (1 x not an image): ")
    assert '"shard": "00000.tar"' in (tmp_path / "out" / "quarantine.jsonl").read_text()
    with pytest.raises(DataError, match="max_bad_fraction"):
        pretrain(settings(shards, tmp_path / "other", "data.max_bad_fraction=0", "run.steps=5"))


def test_what_cannot_start(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No shard at"):
        pretrain(make_run(f"data.train={tmp_path / 'nothing'}"))
    with pytest.raises(VlkitError, match="fewer than one global batch of 64"):
        pretrain(make_run("data.global_batch_size=64"))
    with pytest.raises(VlkitError, match=r"ViT-B-33.*Did you mean"):
        pretrain(make_run("model.name=ViT-B-33"))
    (tmp_path / "file").write_text("")
    with pytest.raises(VlkitError, match="Cannot write the run folder"):
        pretrain(make_run(f"run.out={tmp_path / 'file'}"))
    assert not (tmp_path / "out").exists()


def test_settings_without_effect_are_said(make_run: Callable[..., RunConfig]) -> None:
    said: list[str] = []
    pretrain(make_run("run.steps=1", "optim.schedule=constant", "optim.min_lr=1e-3"), say=said.append)
    assert said == [
        "optim.min_lr = 0.001 has no effect: the schedule is constant.",
        "optim.warmup is 2 steps and the run has 1: optim.lr is never reached.",
    ]


def test_progress_is_told(make_run: Callable[..., RunConfig]) -> None:
    seen: list[tuple[int, int]] = []
    pretrain(make_run("run.steps=3"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_precision_words() -> None:
    with pytest.raises(ConfigError, match="precision"):
        load_run(
            {"run": {"out": "x", "steps": 1}, "model": {"name": "a"}, "data": {"train": "x"}}, ["optim.precision=fp16"]
        )
