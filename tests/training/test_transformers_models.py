"""Runs that start from models of transformers: SigLIP as it is, CLIP on open_clip, both saved, resumed and loaded."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlkit.config import RunConfig, load_run
from vlkit.errors import CheckpointError, ConfigError, ModelError
from vlkit.models.hf_layout import write_clip_tokenizer
from vlkit.models.layers import layers_of
from vlkit.models.load import load_embedder, load_encoder
from vlkit.settings import Duration
from vlkit.training.checkpoint import checkpoints
from vlkit.training.loop import Every, Moment
from vlkit.training.pretrain import pretrain

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**TOWER, "image_size": 32, "patch_size": 8}
WORDS = ("red", "green", "blue", "white", "black", "gray", "pink", "orange")
STEPS = 4


def files_of(count: int) -> Iterator[tuple[str, bytes]]:
    made = np.random.default_rng(0)
    for i in range(count):
        picture = io.BytesIO()
        Image.fromarray(made.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "PNG")
        yield f"{i:04d}.png", picture.getvalue()
        yield f"{i:04d}.txt", f"a {WORDS[i % 8]} photo of {WORDS[i // 2]}".encode()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    return write_tar(tmp_path_factory.mktemp("data") / "0.tar", files_of(16))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SiglipModel with a word-level tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    words = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", "a", "photo", "of", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 8}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text = {**TOWER, **ids, "vocab_size": len(words), "max_position_embeddings": 8, "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=IMAGE))
    model.logit_bias.data.fill_(-7.5)
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3).save_pretrained(folder)
    return folder


def make_clip(folder: Path, shortest_edge: int) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text = {**TOWER, **ids, "vocab_size": 49408, "max_position_embeddings": 12, "hidden_act": "quick_gelu"}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**IMAGE, "hidden_act": "quick_gelu"}))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": shortest_edge}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    write_clip_tokenizer(folder, 12)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"), 32)


@pytest.fixture(scope="module")
def cutting_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose preprocessing open_clip cannot record."""
    return make_clip(tmp_path_factory.mktemp("cutting"), 36)


@pytest.fixture
def make_run(shard: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(out: str, init: Path, **sections: Any) -> RunConfig:
        run: dict[str, Any] = {
            "run": {"out": str(tmp_path / out), "steps": STEPS, "seed": 1, "device": "cpu"},
            "model": {"init": f"hf:{init}"},
            "data": {"train": str(shard), "global_batch_size": 4, "workers": 0},
            "optim": {"lr": 1e-3},
            "checkpoint": {"every": "2 steps", "keep_last": 9},
        }
        for name, values in sections.items():
            run[name] = values if isinstance(values, list) else {**run.get(name, {}), **values}
        return load_run(run)

    return make


def weights(out: str | Path, name: str = "model") -> dict[str, Tensor]:
    return load_encoder(f"run:{out}/{name}").weights()


def steps_of(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def stop_after(step: int) -> Callable[[], bool]:
    asked = iter(range(1, 100))
    return lambda: next(asked) == step


def test_siglip_is_trained_interrupted_and_saved_as_it_is(siglip: Path, make_run: Callable[..., RunConfig]) -> None:
    from transformers import SiglipModel

    options: dict[str, Any] = {"loss": {"sigmoid": 1.0}, "optim": {"ema": 0.9, "layer_decay": 0.9}}
    options["model"] = {"init": f"hf:{siglip}", "grad_checkpointing": True}
    whole, parts = (make_run(name, siglip, **options) for name in ("whole", "parts"))
    pretrain(whole)
    pretrain(parts, stop=stop_after(3))
    pretrain(parts, resume=True)
    start, end = load_encoder(f"hf:{siglip}"), load_encoder(f"run:{whole.run.out}")
    for name in ("model", "model_ema"):
        expected = weights(whole.run.out, name)
        assert all(torch.equal(value, expected[key]) for key, value in weights(parts.run.out, name).items())
    assert [line["loss"] for line in steps_of(whole.run.out)] == [line["loss"] for line in steps_of(parts.run.out)]
    # The bias and the scale go on from where they were.
    first = steps_of(whole.run.out)[0]
    assert (first["logit_bias"], first["logit_scale"]) == pytest.approx((-7.5, np.exp(1.5)), abs=0.02)
    assert end.training_family == "sigmoid" and end.logit_bias.item() != -7.5  # type: ignore[union-attr]
    assert not any(torch.equal(value, end.weights()[name]) for name, value in start.weights().items())
    # The same model in plain transformers, with the same processor and tokenizer; and of a checkpoint.
    plain = SiglipModel.from_pretrained(Path(whole.run.out) / "model").state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in end.weights().items())
    for folder in (Path(whole.run.out) / "model", checkpoints(Path(whole.run.out))[-1] / "model"):
        again = load_encoder(f"local-dir:{folder}")
        assert again.record() == start.record() and again.preprocess == start.preprocess
        assert torch.equal(again.tokenize(["a red photo"]), start.tokenize(["a red photo"]))
    assert load_encoder(f"hf:{whole.run.out}/model").preprocess == start.preprocess
    assert load_embedder(f"run:{whole.run.out}", "cpu").embed_texts(["a pink photo"]).shape == (1, 32)


@pytest.mark.slow
def test_freezing_and_stages_of_siglip(siglip: Path, make_run: Callable[..., RunConfig]) -> None:
    model = {"init": f"hf:{siglip}", "freeze": ["image"], "unfreeze": {"image": 1}}
    stages = [{"length": 3, "image_size": 16}, {}]
    run = make_run("lit", siglip, loss={"clip": 1.0}, model=model, stages=stages)
    pretrain(run)
    start, end = load_encoder(f"hf:{siglip}").weights(), weights(run.run.out)
    same = {name for name, value in start.items() if torch.equal(value, end[name])}
    head = {name for name in start if name.startswith("vision_model.head.")}
    # A softmax loss does not read the bias; of the image tower the last group alone is trained, which is the head.
    assert same == {"logit_bias"} | {name for name in start if name.startswith("vision_model.")} - head
    assert head and not head & same


def test_layers_of_models_of_transformers(siglip: Path, clip: Path) -> None:
    for folder in (siglip, clip):
        encoder = load_encoder(f"hf:{folder}")
        groups = {side: layers_of(encoder, side) for side in ("image", "text")}
        assert {len(found) for found in groups.values()} == {4}  # input, two blocks, output
        of_towers = [name for found in groups.values() for group in found for name in group]
        rest = {name for name, _ in encoder.named_parameters()} - set(of_towers)
        assert len(of_towers) == len(set(of_towers)) and rest <= {"model.logit_scale", "model.logit_bias"}
        assert any("post_layernorm" in name for name in groups["image"][2])
        assert all("embeddings" in name or "pre_layrnorm" in name for name in groups["image"][0])


def test_clip_is_trained_on_open_clip(clip: Path, make_run: Callable[..., RunConfig]) -> None:
    run = make_run("clip", clip, run={"steps": 2}, model={"init": f"hf:{clip}", "lora": {"rank": 2}})
    seen: list[Tensor] = []

    def look(moment: Moment) -> None:
        seen.append(moment.encoder.encode_text(moment.encoder.tokenize(["a red photo"])).detach())

    pretrain(run, [Every(Duration(1, "steps"), look)])
    start, end = load_encoder(f"hf:{clip}"), load_encoder(f"run:{run.run.out}")
    assert end.record()["library"] == "open_clip" and "text_tower" in end.gives
    text = start.encode_text(start.tokenize(["a red photo"]))
    torch.testing.assert_close(seen[0], text, atol=0.02, rtol=0)  # one step away
    assert (seen[-1] - text).abs().max() > 1e-4


def test_a_clip_that_open_clip_cannot_hold_is_trained_as_it_is(
    cutting_clip: Path, make_run: Callable[..., RunConfig]
) -> None:
    from transformers import CLIPModel

    run = make_run("cut", cutting_clip)
    pretrain(run, stop=stop_after(3))
    pretrain(run, resume=True)
    end = load_encoder(f"run:{run.run.out}")
    assert end.record()["library"] == "transformers"
    assert (end.preprocess.crop_pct, end.tokenizer_id) == (32 / 36, "open_clip:clip_bpe")
    plain = CLIPModel.from_pretrained(Path(run.run.out) / "model")
    assert torch.equal(plain.state_dict()["text_projection.weight"], end.weights()["text_projection.weight"])
    with pytest.raises(ConfigError, match=r"loss\.sigmoid needs a logit_bias, which this HfEncoder lacks"):
        pretrain(make_run("sigmoid", cutting_clip, loss={"sigmoid": 1.0}))
    with pytest.raises(ModelError, match="vlkit export hf:NAME --to open_clip"):
        pretrain(make_run("lora", cutting_clip, model={"init": f"hf:{cutting_clip}", "lora": {}}))


def test_a_damaged_model_and_another_model_are_refused(
    siglip: Path, cutting_clip: Path, make_run: Callable[..., RunConfig]
) -> None:
    run = make_run("out", siglip, loss={"sigmoid": 1.0})
    pretrain(run, stop=stop_after(2))
    with pytest.raises(CheckpointError, match=r'model.architecture: "siglip" -> "clip"'):
        pretrain(make_run("out", cutting_clip), resume=True)
    folder = checkpoints(Path(run.run.out))[-1] / "model"
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json has 2 bytes"):
        load_encoder(f"local-dir:{folder}")
