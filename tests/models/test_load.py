"""Names of models: what they load, and what is said when they do not."""

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlkit.errors import CheckpointError, ModelError, VlkitError
from vlkit.models.load import load_embedder, load_encoder, pick_device
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder, load_published
from vlkit.models.saved import save_encoder, write_manifest
from vlkit.models.weight_files import weight_names

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
SMALL: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}


@pytest.fixture(scope="module")
def small() -> OpenClipEncoder:
    torch.manual_seed(0)
    return build_encoder(SMALL).eval()


@pytest.fixture
def run_folder(small: OpenClipEncoder, tmp_path: Path) -> Path:
    """A run with two checkpoints and a final model; the scale says which is which."""
    for name, scale in (("checkpoints/step_00000100", 1.0), ("checkpoints/step_00000200", 2.0), ("", 3.0)):
        small.log_scale.data.fill_(scale)
        save_encoder(small, tmp_path / "run" / name / "model")
        if name:
            (tmp_path / "run" / name / "state.json").write_text("{}")
            write_manifest(tmp_path / "run" / name)
    small.log_scale.data.fill_(0.0)
    return tmp_path / "run"


def scale_of(name: str) -> float:
    return round(load_encoder(name).logit_scale().log().item(), 3)


def cut_in_half(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def message(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(VlkitError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("open_clip:ViT-B-33/openai", "No architecture 'ViT-B-33' in open_clip. Did you mean ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79", "No weights 'laion2b_s34b_b79' for ViT-B-32. Did you mean laion2b_s3"),
        ("open_clip:ViT-B-32", "names no weights. Write open_clip:ViT-B-32/TAG with one of: openai, "),
        ("open_clip:ViT-B-32-plus-256/x", "publishes none for ViT-B-32-plus-256"),
        ("open_clip:ViT-B-32@weights.safetensors", "does not say how the weights were trained"),
        ("open_clip:ViT-B-32/openai@missing.safetensors", "No file of weights missing.safetensors"),
        ("ViT-B-32/openai", "lacks its kind: write open_clip:ViT-B-32/openai."),
        ("ViT-B-32", "lacks its kind: write open_clip:ViT-B-32/TAG."),
        ("rum:runs/demo", "unknown kind 'rum'. Valid: open_clip:ARCHITECTURE/TAG, hf:ORG/NAME"),
        ("hx:org/name", "unknown kind 'hx'"),
        ("run:", "ends after the colon"),
        ("nonsense", "`vlkit models` lists"),
        ("", "lacks its kind"),
        ("run:missing", "No run folder missing"),
        ("local-dir:missing", "missing is no model folder: it has no open_clip_config.json"),
    ],
)
def test_names_that_load_nothing(name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in message(load_encoder, name)


def test_a_folder_without_its_kind(run_folder: Path) -> None:
    assert f"write run:{run_folder}" in message(load_encoder, str(run_folder))
    assert f"write local-dir:{run_folder / 'model'}" in message(load_encoder, str(run_folder / "model"))
    assert "for the folder of a training run use run:" in message(load_encoder, f"local-dir:{run_folder}")


def test_without_a_network_the_error_names_the_file_and_its_place() -> None:
    # tests/conftest.py takes the hub offline
    text = message(load_encoder, "open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert "open_clip_model.safetensors or open_clip_pytorch_model.bin" in text
    assert "/laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in text
    assert "open_clip:ViT-B-32/laion2b_s34b_b79k@/path/to/open_clip_model.safetensors" in text
    assert os.path.join("huggingface", "hub") in text


def test_a_run_gives_its_final_model_or_its_last_whole_checkpoint(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert scale_of(f"run:{run_folder}") == scale_of(f"run:{run_folder / 'model'}") == 3.0
    assert not caplog.messages
    cut_in_half(run_folder / "model" / "open_clip_model.safetensors")
    assert scale_of(f"run:{run_folder}") == 2.0
    assert "bytes" in caplog.text and "step_00000200" in caplog.text
    cut_in_half(run_folder / "checkpoints" / "step_00000200" / "state.json")
    assert scale_of(f"run:{run_folder}") == 1.0
    cut_in_half(run_folder / "checkpoints" / "step_00000100" / "model" / "open_clip_config.json")
    text = message(load_encoder, f"run:{run_folder}")
    assert text.startswith("No whole model in run folder") and "step_00000100" in text


def test_a_run_folder_without_any_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert "holds metrics.jsonl" in message(load_encoder, f"run:{tmp_path}")


def test_a_cut_or_changed_model_folder(small: OpenClipEncoder, tmp_path: Path) -> None:
    folder = save_encoder(small, tmp_path / "model")
    cut_in_half(folder / "open_clip_model.safetensors")
    assert "is damaged" in message(load_encoder, f"local-dir:{folder}")
    (folder / "manifest.json").unlink()
    assert "no whole safetensors file" in message(load_encoder, f"local-dir:{folder}")
    (folder / "open_clip_model.safetensors").unlink()
    assert "Expected open_clip_model.safetensors" in message(load_encoder, f"local-dir:{folder}")
    (folder / "open_clip_config.json").write_text("{}")
    assert "has no model_cfg" in message(load_encoder, f"local-dir:{folder}")


def test_weights_of_another_architecture(small: OpenClipEncoder, tmp_path: Path) -> None:
    folder = save_encoder(small, tmp_path / "model")
    other = build_encoder({**SMALL, "vision_cfg": {**VIT, "width": 128, "layers": 2}})
    save_file(other.weights(), folder / "open_clip_model.safetensors")
    write_manifest(folder)
    text = message(load_encoder, f"local-dir:{folder}")
    assert "not expected: visual.transformer.resblocks.1." in text and "and 8 more" in text
    assert "visual.class_embedding is (128,), expected (64,)" in text
    (folder / "vlkit.json").unlink()  # a folder of plain open_clip
    write_manifest(folder)
    assert "does not fit architecture model" in message(load_encoder, f"local-dir:{folder}")


def test_weights_in_the_layout_of_plain_clip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = open_clip.CLIP(**SMALL).eval()
    encoder = build_encoder(SMALL).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "a.pt")
    images = torch.rand(2, 3, 32, 32)
    for file in ("plain.safetensors", "a.pt"):
        load_published(encoder, tmp_path / file, weight_names(tmp_path / file), where=file)
        expected = plain.encode_image((images - encoder.mean) / encoder.std, normalize=True)
        torch.testing.assert_close(encoder.encode_image(images), expected, atol=1e-5, rtol=0)
        expected = plain.encode_text(open_clip.SimpleTokenizer(context_length=16)(["a dog"]), normalize=True)
        torch.testing.assert_close(encoder.encode_text(encoder.tokenize(["a dog"])), expected, atol=1e-5, rtol=0)


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harm_done",)


def test_pickled_code_is_refused_and_not_run(
    small: OpenClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, tmp_path / "zip.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"state_dict": Harmful()}, protocol=2))
    torch.save(small.model, tmp_path / "whole_model.pt")
    for name in ("zip.pt", "old.bin", "whole_model.pt"):
        text = message(load_encoder, f"open_clip:ViT-B-32/openai@{tmp_path / name}")
        assert f"{name} is a pickle that holds more than weights" in text and "refused" in text
    assert not (tmp_path / "harm_done").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_and_other_files_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    name = f"open_clip:ViT-B-32/openai@{tmp_path}/"
    assert "TorchScript archive, which holds code: refused" in message(load_encoder, name + "script.pt")
    assert "text.pt" in message(load_encoder, name + "text.pt")
    assert "expected a state dict" in message(load_encoder, name + "list.pt")


def test_bias_of_sigmoid_training(small: OpenClipEncoder, tmp_path: Path) -> None:
    with_bias = build_encoder(SMALL, init_logit_bias=-10)
    save_file(small.weights(), tmp_path / "clip.safetensors")
    save_file(with_bias.weights(), tmp_path / "siglip.safetensors")
    clip, siglip = tmp_path / "clip.safetensors", tmp_path / "siglip.safetensors"
    load_published(with_bias, clip, weight_names(clip), where="clip")
    assert with_bias.logit_bias is not None and with_bias.logit_bias.item() == -10  # open_clip alone: 0
    text = message(load_published, small, siglip, weight_names(siglip), "this file")
    assert text.startswith("this file was trained with a sigmoid loss") and "init_logit_bias = -10" in text


@pytest.mark.slow
def test_published_weights_from_a_file(tmp_path: Path) -> None:
    # Random weights stand for OpenAI's; the record is that of the tag.
    save_file(build_encoder("RN50").weights(), tmp_path / "RN50.safetensors")
    encoder = load_encoder(f"open_clip:RN50/openai@{tmp_path / 'RN50.safetensors'}")
    assert encoder.record()["model_cfg"]["quick_gelu"] is True
    assert encoder.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)


def test_another_resolution(run_folder: Path) -> None:
    larger = load_encoder(f"run:{run_folder}", image_size=48)
    assert larger.image_size == larger.preprocess.size == 48
    assert larger.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 16)


def test_devices(run_folder: Path) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert load_embedder(f"run:{run_folder}").device.type == expected
    assert "Did you mean cuda" in message(pick_device, "cuda_")
    assert "not available on this machine. Usable: auto" in message(pick_device, "cuda:99")


def test_errors_are_of_the_right_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_encoder("nonsense")
    with pytest.raises(CheckpointError):
        load_encoder(f"run:{tmp_path}")
