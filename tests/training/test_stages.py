"""Stages, patch dropout, averaged weights, LoRA, FastCLIP and distillation in whole runs on tiny shards."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlkit.config import RunConfig, load_run
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError, DataError
from vlkit.models.load import load_encoder
from vlkit.models.tokenizers import TextTokenizer
from vlkit.settings import Duration
from vlkit.training import assemble
from vlkit.training.loop import Every, Moment
from vlkit.training.pretrain import pretrain
from vlkit.training.stages import PATCH_DRAWS, Stage, check_stages, plan_stages
from vlkit.training.stream import Stream
from vlkit.training.teacher import Teacher

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
STEPS = 8


def files_of(count: int, teacher: bool) -> Iterator[tuple[str, bytes]]:
    made = np.random.default_rng(0)
    for i in range(count):
        picture = io.BytesIO()
        Image.fromarray(made.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "PNG")
        captions = f"the first caption of number {i}\nanother caption of {i} and a good many more words than that"
        yield f"{i:04d}.png", picture.getvalue()
        yield f"{i:04d}.txt", captions.encode()
        for name, rows in (("teacher_image", 1), ("teacher_text", 2)):
            array = io.BytesIO()
            np.save(array, made.standard_normal((rows, 6)).astype(np.float16))
            if teacher:
                yield f"{i:04d}.{name}.npy", array.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    return write_tar(tmp_path_factory.mktemp("data") / "0.tar", files_of(20, teacher=True))


def settings(shard: Path, out: Path, **sections: Any) -> RunConfig:
    run: dict[str, Any] = {
        "run": {"out": str(out), "steps": STEPS, "seed": 1, "device": "cpu"},
        "model": {"architecture": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}},
        "data": {"train": str(shard), "global_batch_size": 6, "workers": 0},
        "optim": {"lr": 1e-2, "warmup": 2},
        "checkpoint": {"every": "3 steps", "keep_last": 9},
    }
    for name, values in sections.items():
        run[name] = values if isinstance(values, list) else {**run.get(name, {}), **values}
    return load_run(run)


def weights(out: Path, name: str = "model") -> dict[str, Tensor]:
    return load_file(out / name / "open_clip_model.safetensors")


def parameter_size(moment: Moment) -> dict[str, float]:
    assert not moment.encoder.training
    with torch.no_grad():
        size = moment.encoder.image_size
        return {"size": moment.encoder.encode_image(torch.zeros(1, 3, size, size, dtype=torch.uint8)).sum().item()}


CASES: dict[str, dict[str, Any]] = {
    "stages, patch dropout, averaged weights, layer-wise rates": {
        "model": {"patch_dropout": 0.5, "patch_dropout_tail": 2, "grad_checkpointing": True},
        "optim": {"ema": 0.9, "layer_decay": 0.8, "schedule": "wsd"},
        "stages": [{"length": 4, "image_size": 16, "text_length": 5}, {}],
    },
    "FastCLIP with a teacher whose features are stored": {
        "loss": {"fast_clip": {"gamma": 0.5}, "distillation": 0.5},
        "data": {"chunk_size": 3, "captions_per_image": 2},
    },
    "LoRA": {"model": {"lora": {"rank": 2, "targets": ["q", "o", "mlp"]}, "patch_dropout": 0.25}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(
    case: str, shard: Path, tmp_path: Path
) -> None:
    every = [Every(Duration(4, "steps"), parameter_size)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(settings(shard, whole, **CASES[case]), every)
    for after in (3, 2, 99):  # step 3 is in the first stage, step 5 in the second
        asked = iter(range(1, 1000))
        pretrain(settings(shard, parts, **CASES[case]), every, resume=True, stop=lambda: next(asked) == after)  # noqa: B023
    for name in ("model", *(["model_ema"] if "optim" in CASES[case] else [])):
        expected = weights(whole, name)
        assert all(torch.equal(value, expected[key]) for key, value in weights(parts, name).items())
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]
    assert [line.get("eval") for line in lines] == [line.get("eval") for line in again]


def test_averaged_weights_are_evaluated_and_exported_beside_the_others(shard: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def keep(moment: Moment) -> dict[str, float]:
        seen.append(moment.encoder.weights()["visual.proj"].clone())
        return {"seen": float(len(seen))}

    pretrain(settings(shard, tmp_path, optim={"ema": 0.5}), [Every(Duration(1, "steps"), keep)])
    assert len(seen) == 2 * STEPS
    averaged = seen[1]  # after the first step: start and the first weights, 2/11 and 9/11
    for step in range(1, STEPS):
        decay = min(0.5, (2 + step) / (11 + step))
        averaged = decay * averaged + (1 - decay) * seen[2 * step]
        torch.testing.assert_close(seen[2 * step + 1], averaged, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights(tmp_path)["visual.proj"], seen[-2])
    assert torch.equal(weights(tmp_path, "model_ema")["visual.proj"], seen[-1])
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["eval"] == {"seen": 1.0, "ema/seen": 2.0}
    assert torch.equal(load_encoder(f"run:{tmp_path}/model_ema").weights()["visual.proj"], seen[-1])


def make_stream(run: RunConfig) -> Stream:
    shards = ShardSet.open(run.data.train)
    encoder = assemble.build_learner(run, torch.device("cpu")).encoder
    stages = plan_stages(run, steps=STEPS, steps_per_epoch=3)
    check_stages(stages, encoder)

    def make_loader(preprocess: Preprocess, tokenize: TextTokenizer) -> Loader:
        return assemble.build_loader(run, shards, encoder, preprocess=preprocess, tokenize=tokenize)

    return Stream(run, encoder, assemble.build_loader(run, shards, encoder), make_loader, stages, STEPS)


def test_stages_change_size_and_length_but_not_the_order_of_the_samples(shard: Path, tmp_path: Path) -> None:
    stages = [{"length": 0.5, "image_size": 16, "text_length": 5}, {"length": "6 samples", "image_size": 24}, {}]
    flip = {"patch_dropout": 0.5, "patch_dropout_tail": 2}
    batches = list(islice(make_stream(settings(shard, tmp_path, stages=stages, model=flip)).batches(0), STEPS))
    plain = list(islice(make_stream(settings(shard, tmp_path)).batches(0), STEPS))
    assert [batch.images.shape[-1] for batch in batches] == [16] * 4 + [24] + [32] * 3
    assert {batch.tokens.shape[1] for batch in batches[:4]} == {5}
    assert all(batch.tokens.shape[1] > 5 for batch in batches[4:])
    assert [batch.ids.tolist() for batch in batches] == [batch.ids.tolist() for batch in plain]
    assert torch.equal(batches[7].images, plain[7].images)
    # The numbers for patch dropout: one an image, up to the tail; another in each epoch.
    assert [PATCH_DRAWS in batch.extra for batch in batches] == [True] * 6 + [False] * 2
    draws = [dict(zip(b.ids.tolist(), b.extra[PATCH_DRAWS].tolist(), strict=True)) for b in batches[:6]]
    first, second = ({key: value for one in part for key, value in one.items()} for part in (draws[:3], draws[3:]))
    assert len(set(first.values())) == 18
    assert all(first[key] != second[key] for key in first.keys() & second.keys())
    # From any step on, and with data left out, the stream is the same.
    stream = make_stream(settings(shard, tmp_path, stages=stages, model=flip))
    for batch, expected in zip(stream.batches(3), batches[3:], strict=False):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.tokens, expected.tokens)
    (later,) = islice(stream.batches(3, skipped=1), 1)
    assert later.images.shape[-1] == 16 and later.ids.tolist() == batches[4].ids.tolist()


def test_stages_leave_the_shape_of_the_weights(shard: Path, tmp_path: Path) -> None:
    pretrain(settings(shard, tmp_path, stages=[{"length": 0.5, "image_size": 16}, {}]))
    assert weights(tmp_path)["visual.positional_embedding"].shape == (17, 32)
    assert load_encoder(f"run:{tmp_path}").image_size == 32


def test_lora_is_exported_as_a_plain_model_also_from_a_checkpoint(shard: Path, tmp_path: Path) -> None:
    stock = settings(shard, tmp_path / "stock", run={"steps": 1}, optim={"lr": 1e-9})
    pretrain(stock)
    init = {"architecture": None, "init": f"run:{tmp_path / 'stock'}", "lora": {"rank": 2, "towers": ["image"]}}
    pretrain(settings(shard, tmp_path / "tuned", model=init))
    before, after = weights(tmp_path / "stock"), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual.transformer.resblocks.0.attn.in_proj_weight", "logit_scale"}
    # The last checkpoint keeps weights and updates apart, and is merged when it is loaded.
    last = sorted((tmp_path / "tuned" / "checkpoints").iterdir())[-1]
    loaded = load_encoder(f"local-dir:{last / 'model'}").weights()
    assert all(torch.equal(loaded[name], value) for name, value in after.items())


def test_a_teacher_beside_the_student_under_its_own_preprocessing(shard: Path, tmp_path: Path) -> None:
    big = {"architecture": {"embed_dim": 8, "vision_cfg": {**VIT, "image_size": 48}, "text_cfg": TEXT}}
    pretrain(settings(shard, tmp_path / "teacher", run={"steps": 1}, model=big))
    teacher = {"weight": 1.0, "teacher": f"run:{tmp_path / 'teacher'}"}
    pretrain(settings(shard, tmp_path / "student", run={"steps": 40}, loss={"distillation": teacher}))
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["parts"]["distillation"] < 0.8 * lines[0]["parts"]["distillation"]
    unlike = load_encoder(f"run:{tmp_path / 'teacher'}")
    unlike.tokenize.tokenizer_id = "hf:other/tokenizer"
    with pytest.raises(ConfigError, match="the teacher's tokenizer is hf:other/tokenizer, the student's open_clip"):
        Teacher(unlike, load_encoder(f"run:{tmp_path / 'student'}"), 8)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"length": 3}, {"length": 2}], "the last of the stages has a length"),
        ([{}, {}], "stage 0 has no length"),
        ([{"length": 9}, {}], "stages.0 would last from step 0 to 9 of 8"),
        ([{"length": 8}, {}], "stages.1 would last from step 8 to 8 of 8"),
        ([{"length": 2, "image_size": 20}, {}], "cannot take images of 20 pixels .*no multiple of the patch size"),
        ([{"length": 2, "text_length": 13}, {}], "text_length = 13, but this model takes 12 tokens"),
    ],
)
def test_stages_that_cannot_be(stages: list[Any], message: str, shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(settings(shard, tmp_path, stages=stages))


def test_lengths_of_stages_in_every_unit(shard: Path, tmp_path: Path) -> None:
    stages = [{"length": 0.25, "image_size": 16}, {"length": "1 epoch"}, {"length": "12 samples"}, {}]
    run = settings(shard, tmp_path, stages=stages)
    found = plan_stages(run, steps=40, steps_per_epoch=5)
    assert [stage.end for stage in found] == [10, 15, 17, 40] and found[0].image_size == 16
    assert plan_stages(settings(shard, tmp_path), steps=7, steps_per_epoch=5) == [Stage(7, None, None)]


def test_shards_without_the_teachers_features(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    plain = write_tar(tmp_path / "plain.tar", files_of(20, teacher=False))
    with pytest.raises(DataError, match=r"plain.tar, sample \d+: there is no .teacher_text.npy"):
        pretrain(settings(plain, tmp_path / "out", loss={"distillation": 1.0}))


def test_blocks_are_compiled(shard: Path, tmp_path: Path) -> None:
    encoder = assemble.build_learner(settings(shard, tmp_path, model={"compile": True}), torch.device("cpu")).encoder
    compiled = [name for name, module in encoder.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["model.visual.transformer.resblocks.0", "model.text.transformer.resblocks.0"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
def test_compiled_blocks_train_as_the_others(shard: Path, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("compiled", True)):
        pretrain(settings(shard, tmp_path / name, run={"steps": 3}, model={"compile": on}))
    # Losses, not weights: where a gradient is zero but for roundings (the bias of k) AdamW makes full steps of them.
    files = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "compiled")]
    plain, compiled = ([json.loads(line)["loss"] for line in lines] for lines in files)
    assert compiled == pytest.approx(plain, rel=1e-4)
