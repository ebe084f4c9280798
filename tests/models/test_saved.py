"""Model folders: read back exactly, read by plain open_clip, and whole or not there."""

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from vlkit.errors import CheckpointError
from vlkit.models import saved
from vlkit.models.load import load_encoder
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder
from vlkit.models.saved import atomic_folder, check_manifest, save_encoder, write_manifest

TEXTS = ["a dog", "a photo of a very small cat on the mat", "word " * 60]
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "siglip": {
        "embed_dim": 16,
        "vision_cfg": {**VIT, "pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True, "proj_bias": True},
        "init_logit_bias": -10.0,
    },
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
        "text_cfg": TEXT,
    },
    "timm": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "coca": {
        "embed_dim": 16,
        "vision_cfg": {**VIT, **ATTENTION_POOL},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1, "context_length": 24},
    },
}


@pytest.fixture(scope="module")
def vit() -> OpenClipEncoder:
    torch.manual_seed(0)
    return build_encoder(ARCHITECTURES["vit"]).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_plain_open_clip_reads_a_saved_model_with_equal_features(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    record = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "resize_mode": "squash", "interpolation": "bilinear"}
    encoder = build_encoder(ARCHITECTURES[name], preprocess=record).eval()
    folder = save_encoder(encoder, tmp_path / "model")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    theirs.eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = theirs.encode_image(transform.transforms[-1](images / 255), normalize=True)
    torch.testing.assert_close(encoder.encode_image(images), expected, atol=1e-5, rtol=0)
    expected = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_text(encoder.tokenize(TEXTS)), expected, atol=1e-5, rtol=0)
    assert tokens.shape == (3, 24)

    back = load_encoder(f"local-dir:{folder}")
    assert back.record()["model_cfg"] == encoder.record()["model_cfg"]
    assert back.preprocess == encoder.preprocess and back.tokenizer_id == encoder.tokenizer_id
    assert back.training_family == encoder.training_family
    assert back.weights().keys() == encoder.weights().keys()
    assert all(torch.equal(value, encoder.weights()[key]) for key, value in back.weights().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_left_as_the_memory_held_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    encoder = build_encoder(ARCHITECTURES[name])
    assert [key for key, value in encoder.weights().items() if value.isnan().any()] == []


def test_a_model_with_a_tokenizer_from_the_hub_takes_it_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_word_tokenizer(tmp_path / "tokenizer")
    text = {**TEXT, "vocab_size": 6, "hf_tokenizer_name": str(tmp_path / "tokenizer"), "pool_type": "last"}
    encoder = build_encoder({**ARCHITECTURES["vit"], "text_cfg": text}).eval()
    folder = save_encoder(encoder, tmp_path / "model")
    assert len(AutoTokenizer.from_pretrained(folder)) == 6
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    back = load_encoder(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a dog", ""])
    assert back.tokenize(["a dog", ""]).equal(tokens)
    assert back.tokenizer_id == encoder.tokenizer_id


def test_saving_again_replaces_the_folder_and_leaves_nothing_behind(vit: OpenClipEncoder, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "model"
    save_encoder(vit, folder)
    (folder / "old").write_text("from before")
    save_encoder(vit, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [saved.CONFIG, saved.WEIGHTS, saved.RECORD, saved.MANIFEST]
    )
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert check_manifest(folder) is None
    record = json.loads((folder / saved.RECORD).read_text())
    assert record["family"] == "softmax" and record["tokenizer"] == "open_clip:clip_bpe"


def test_the_same_weights_make_the_same_bytes(vit: OpenClipEncoder, tmp_path: Path) -> None:
    first, second = save_encoder(vit, tmp_path / "a"), save_encoder(vit, tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "x") as new:
        (new / "half").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "kept").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_no_space_left(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"Cannot write .*model: No space left"),
        atomic_folder(tmp_path / "model") as new,
    ):
        (new / "weights").symlink_to("/dev/full")
        (new / "weights").write_bytes(b"0" * 10)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_folder(vit: OpenClipEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cannot write"):
        save_encoder(vit, tmp_path / "file" / "model")


def test_manifests_notice_every_change(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "sub" / "b").write_bytes(b"67890")
    write_manifest(tmp_path)
    assert check_manifest(tmp_path) is None
    (tmp_path / "sub" / "b").write_bytes(b"67891")
    assert "b differs from what was written" in str(check_manifest(tmp_path))
    (tmp_path / "sub" / "b").write_bytes(b"678")
    assert "b has 3 bytes, 5 were written" in str(check_manifest(tmp_path))
    (tmp_path / "sub" / "b").unlink()
    assert "b is missing" in str(check_manifest(tmp_path))
    (tmp_path / saved.MANIFEST).write_text('{"files": ')
    assert "no whole JSON file" in str(check_manifest(tmp_path))
    (tmp_path / saved.MANIFEST).unlink()
    assert "Cannot read" in str(check_manifest(tmp_path))


def make_word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "dog": 3}, unk_token="[UNK]"))
    words.add_special_tokens(["[CLS]", "[SEP]"])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
