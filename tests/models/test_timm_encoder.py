"""timm towers: features and pixels as timm's own model and transform give them, and no texts."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from vlkit.errors import CheckpointError, ModelError
from vlkit.models.load import load_embedder, load_encoder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """With the classifier it was trained with, as published files have it."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_features_and_pixels_are_timms(weights: Path) -> None:
    embedder = load_embedder(f"timm:test_vit@{weights}", decode="reference")
    model = timm.create_model("test_vit", num_classes=0)
    model.load_state_dict({k: v for k, v in load_any(weights).items() if not k.startswith("head.")})
    config = resolve_model_data_config(model)
    assert config["crop_pct"] < 1, "so that the cut is tested"
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC)
    theirs = create_transform(**config, is_training=False)(image)
    ours = embedder.encoder.normalize_pixels(
        embedder.encoder.preprocess.with_pillow(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]
    )[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.eval()(theirs[None]), dim=-1)
    torch.testing.assert_close(embedder.embed_images([image]), expected, atol=1e-5, rtol=0)


def load_any(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_texts_are_refused(weights: Path) -> None:
    embedder = load_embedder(f"timm:test_vit@{weights}")
    assert embedder.encoder.gives == {"image"}
    with pytest.raises(ModelError, match="embeds images only"):
        embedder.embed_texts(["a cat"])
    with pytest.raises(ModelError, match="it has no text tower"):
        embedder.encoder.encode_text(torch.zeros(1, 1, dtype=torch.int64))


def test_another_size(weights: Path) -> None:
    bigger = load_encoder(f"timm:resnet18@{resnet(weights.parent)}", image_size=64)
    assert bigger.encode_image(torch.rand(1, 3, 64, 64)).shape == (1, 512)


def resnet(folder: Path) -> Path:
    save_file(timm.create_model("resnet18").state_dict(), folder / "r.safetensors")
    return folder / "r.safetensors"


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("timm:resnet81", ModelError, "No timm model 'resnet81'. Did you mean"),
        ("timm:resnet18.a1_in2k", ModelError, "No weights 'resnet18.a1_in2k' in timm. Did you mean"),
        ("timm:test_vit@missing.safetensors", CheckpointError, "No file of weights missing.safetensors"),
    ],
)
def test_names(name: str, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected.replace(".", r"\.")):
        load_encoder(name)


def test_weights_of_another_model(weights: Path) -> None:
    with pytest.raises(CheckpointError, match="does not hold weights of timm:resnet18"):
        load_encoder(f"timm:resnet18@{weights}")
