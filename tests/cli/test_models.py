"""`vlkit models`: names to paste, sizes, what is on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_table_of_names(call_vlkit: Callable[..., Any]) -> None:
    called = call_vlkit("models", "vit-b-32/laion2b")
    assert called.code == 0
    assert "open_clip:ViT-B-32/laion2b_s34b_b79k" in called.out and "87.8" in called.out
    assert "published weights" in called.err


def test_json_has_one_object_a_line(call_vlkit: Callable[..., Any]) -> None:
    lines = call_vlkit("models", "ViT-B-32-plus", "--json").out.splitlines()
    (offer,) = [json.loads(line) for line in lines]
    assert offer["name"] == offer["architecture"] == "ViT-B-32-plus-256"
    assert offer["tag"] is None and offer["embed_dim"] == 640 and offer["image_size"] == 256
    assert offer["on_disk"] is None and offer["image_parameters"] == 119_133_952


def test_what_is_on_disk(call_vlkit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    weights = repository / "snapshots" / ("0" * 40) / "open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    lines = call_vlkit("models", "ViT-B-32/laion2b", "--json").out.splitlines()
    on_disk = {offer["name"]: offer["on_disk"] for offer in map(json.loads, lines)}
    assert on_disk.pop("open_clip:ViT-B-32/laion2b_s34b_b79k") == str(weights)
    assert set(on_disk.values()) == {None}


def test_a_name_that_is_nowhere(call_vlkit: Callable[..., Any]) -> None:
    called = call_vlkit("models", "ViTB32")
    assert called.code == 1
    assert called.err.strip() == (
        "vlkit: No architecture or tag contains 'ViTB32'. Did you mean ViT-B-32 or ViT-S-32 or ViT-M-32?"
    )
