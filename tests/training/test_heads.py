"""A head trained beside frozen towers, from a run file: PACL."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlkit.addons.exchange import Vectors
from vlkit.addons.pair_scores.pacl import Pacl
from vlkit.addons.reference import Reference
from vlkit.config import RunConfig, load_run
from vlkit.errors import ConfigError, ModelError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder
from vlkit.losses.patch_alignment import patch_alignment_loss
from vlkit.models.heads.patch_alignment import HEAD_FILE, load_head
from vlkit.models.load import load_embedder
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder
from vlkit.settings import Duration
from vlkit.training.checkpoint import checkpoints
from vlkit.training.loop import Every
from vlkit.training.pretrain import pretrain

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16, "patch_dropout": 0.5}
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}


def files_of(count: int) -> Iterator[tuple[str, bytes]]:
    """Pictures with one coloured square each."""
    random = np.random.default_rng(0)
    for i in range(count):
        name = list(COLOURS)[i % 4]
        pixels = random.integers(90, 130, (32, 32, 3), dtype=np.uint8)
        row, column = random.integers(0, 3, 2) * 8
        pixels[row : row + 8, column : column + 8] = COLOURS[name]
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, "PNG")
        yield f"{i:06d}.png", picture.getvalue()
        yield f"{i:06d}.txt", f"a {name} square".encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    """Shards, and an encoder with random weights."""
    folder = tmp_path_factory.mktemp("pacl")
    write_tar(folder / "shards" / "00000.tar", files_of(32))
    torch.manual_seed(0)
    save_encoder(build_encoder({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}), folder / "encoder")
    return folder


def run_file(folder: Path, out: str, *overrides: str) -> RunConfig:
    run: dict[str, Any] = {
        "run": {"out": str(folder / out), "steps": 12, "seed": 3, "device": "cpu"},
        "model": {"init": f"local-dir:{folder / 'encoder'}", "freeze": ["image", "text"]},
        "data": {"train": str(folder / "shards"), "global_batch_size": 16, "workers": 0},
        "loss": {"patch_alignment": {}},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": "1 steps", "precision": "fp32"},
        "checkpoint": {"every": "4 steps"},
    }
    return load_run(run, overrides)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    """A run as it is written above."""
    return pretrain(run_file(folder, "first"))


def test_the_head_learns_and_the_encoder_stays(folder: Path, first: Path) -> None:
    out = first
    assert losses(out)[-1] < losses(out)[0] - 0.1
    before, after = (load_file(path / "open_clip_model.safetensors") for path in (folder / "encoder", out / "model"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # What was trained is what scores: the add-on takes the head for the encoder it was trained on, and for no other.
    model = load_embedder(f"local-dir:{folder / 'encoder'}", "cpu")
    source = CachedEmbedder(lambda: model, None, card_of(model))
    scoring = Pacl(head=str(out)).fit(Reference(task="retrieval"), source)
    tokens = model.encoder.patch_tokens(torch.zeros(2, 3, 32, 32))
    texts = source.embed_texts(["a red square", "a blue square"])
    found = scoring.score(Vectors("image", torch.zeros(2, 16), patch_tokens=tokens.detach()), Vectors("text", texts))
    scale = model.encoder.logit_scale().detach()
    by_loss = patch_alignment_loss(load_head(out).head(tokens), texts, scale, 10.0)
    logits = scale * found
    expected = (torch.nn.functional.cross_entropy(logits, torch.arange(2)) +
                torch.nn.functional.cross_entropy(logits.T, torch.arange(2))) / 2  # fmt: skip
    torch.testing.assert_close(by_loss, expected)


def test_interrupted_and_resumed_is_the_same_to_the_bit(folder: Path, first: Path) -> None:
    whole = pretrain(run_file(folder, "whole", "loss.patch_alignment.learn_attention_scale=true"))
    run = run_file(folder, "broken", "loss.patch_alignment.learn_attention_scale=true")

    def stop(moment: Any) -> None:
        if moment.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(run, every=[Every(Duration(1, "steps"), stop)])
    assert checkpoints(Path(run.run.out))
    again = pretrain(run, resume=True)
    one, other = (load_file(out / HEAD_FILE) for out in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["log_attention_scale"] != load_file(first / HEAD_FILE)["log_attention_scale"]


def test_in_chunks_the_head_gets_the_same_gradients(folder: Path, first: Path) -> None:
    whole = load_file(first / HEAD_FILE)
    chunked = load_file(pretrain(run_file(folder, "chunked", "data.chunk_size=5")) / HEAD_FILE)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, atol=1e-3, rtol=1e-2)


def test_beside_the_loss_of_clip_with_a_tower_that_learns(folder: Path) -> None:
    out = pretrain(run_file(folder, "both", 'model.freeze=["image"]', "loss.clip=1.0", "run.steps=2"))
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"clip", "patch_alignment"} <= line["parts"].keys() if "parts" in line else line
    before, after = (load_file(path / "open_clip_model.safetensors") for path in (folder / "encoder", out / "model"))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"text", "logit_scale"} and (out / HEAD_FILE).exists()


def test_what_does_not_go_together(folder: Path) -> None:
    with pytest.raises(ConfigError, match="compares all patches"):
        run_file(folder, "x", "model.patch_dropout=0.5")
    with pytest.raises(ConfigError, match="freeze names both towers"):
        run_file(folder, "x", "loss={clip = 1.0}")
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    save_encoder(build_encoder({"embed_dim": 16, "vision_cfg": resnet, "text_cfg": TEXT}), folder / "resnet")
    with pytest.raises(ModelError, match="ResNet"):
        pretrain(run_file(folder, "x", f"model.init=local-dir:{folder / 'resnet'}"))
