"""Weights in bf16 and the reference decoder: what they change, and that the cache keeps them apart."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.data.images import iterate_images
from vlkit.data.transforms import Preprocess
from vlkit.errors import ModelError
from vlkit.features.cache import FeatureCache
from vlkit.features.source import open_source
from vlkit.models.bf16 import bf16_copy, gains_by_bf16
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.hf_encoder import HfEncoder
from vlkit.models.load import load_embedder, pick_precision
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_encoder(build_encoder(ARCHITECTURE), folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        blocks = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((90, 70), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        image.save(folder / f"{number}.jpg", quality=95, exif=exif)
    return sorted(folder.iterdir())


def test_bf16_keeps_the_features_and_their_scale(model: str, photos: list[Path]) -> None:
    full, half = load_embedder(model, "cpu"), load_embedder(model, "cpu", precision="bf16")
    for a, b in (
        (full.embed_images(photos), half.embed_images(photos)),
        (full.embed_texts(["a dog", "two cats on a red sofa"]), half.embed_texts(["a dog", "two cats on a red sofa"])),
    ):
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a, b).min() > 0.9995
        assert not torch.equal(a, b)  # the weights are rounded
    assert half.logit_scale == full.logit_scale  # in bf16 14.2857 would become 14.3125
    assert half.identity != full.identity


def test_auto_takes_bf16_only_for_transformers_on_a_processor_that_has_it(model: str) -> None:
    embedder = load_embedder(model, "cpu", precision="auto")
    kinds = {tensor.dtype for tensor in embedder.encoder.weights().values()}
    assert (torch.bfloat16 in kinds) == (pick_precision("auto", CPU) == "bf16")


def test_only_the_matrices_of_blocks_are_rounded_and_features_err_half_as_much(model: str, photos: list[Path]) -> None:
    full = load_embedder(model, "cpu")
    before = {name: tensor.clone() for name, tensor in full.encoder.weights().items()}
    half = replace(full, encoder=bf16_copy(full.encoder))
    rounded = {name for name, tensor in half.encoder.weights().items() if tensor.dtype == torch.bfloat16}
    assert rounded and all(".resblocks." in name and (".attn." in name or ".mlp." in name) for name in rounded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in full.encoder.weights().items())

    everything = load_embedder(model, "cpu")
    for name, tensor in everything.encoder.named_parameters():
        if not name.endswith("logit_scale"):
            tensor.data = tensor.data.to(torch.bfloat16)
    exact = full.embed_images(photos)
    error, error_of_all = ((other.embed_images(photos) - exact).norm(dim=1).mean() for other in (half, everything))
    assert error < 0.5 * error_of_all, (error, error_of_all)


def test_the_class_position_alone_goes_through_the_last_rounded_block(model: str) -> None:
    tower_of = bf16_copy(load_embedder(model, "cpu").encoder)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tower = tower_of.vision_tower
        assert tower.last_of_class is not None
        torch.testing.assert_close(tower.run(images), tower.finish(tower.through_blocks(images)), rtol=0, atol=0.02)
        assert tower.last_of_class(tower.embed(images)).shape == (3, 1, 64)
        # What an add-on changes there is not passed by.
        handle = tower.blocks[-1].module.register_forward_hook(lambda module, inputs, output: 0 * output)
        changed = tower_of.vision_tower
        assert torch.equal(changed.run(images), changed.finish(torch.zeros(3, 17, 64)))
        handle.remove()
    assert tower_of.vision_tower.last_of_class is None  # gradients: training runs whole blocks


def test_a_tower_of_another_kind_is_rounded_as_a_whole() -> None:
    torch.manual_seed(0)
    convolutions = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    encoder = build_encoder({**ARCHITECTURE, "vision_cfg": convolutions}).eval()
    assert not gains_by_bf16(encoder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenize(["a dog", "a cat"])
    half = bf16_copy(encoder)
    kinds = {name: tensor.dtype for name, tensor in half.weights().items() if tensor.is_floating_point()}
    assert {kind for name, kind in kinds.items() if name.startswith("visual.")} == {torch.bfloat16}
    assert kinds["text.token_embedding.weight"] == kinds["logit_scale"] == torch.float32
    with torch.inference_mode():
        for a, b in (
            (encoder.encode_image(images), half.encode_image(images)),
            (encoder.encode_text(tokens), half.encode_text(tokens)),
        ):
            assert torch.cosine_similarity(a, b.float()).min() > 0.999


def timm_in_open_clip() -> DualEncoder:
    tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
    return build_encoder({**ARCHITECTURE, "vision_cfg": tower})


def clip_of_transformers() -> DualEncoder:
    import transformers

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    text = {**tower, "max_position_embeddings": 16, "vocab_size": 49408, "eos_token_id": 49407}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return HfEncoder(transformers.CLIPModel(config), Preprocess(size=32), TextTokenizer(CLIP_BPE, 16))


def siglip_of_transformers() -> DualEncoder:
    import transformers

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    text = {**tower, "max_position_embeddings": 16, "vocab_size": 49408, "projection_size": 64}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return HfEncoder(transformers.SiglipModel(config), Preprocess(size=32), TextTokenizer(CLIP_BPE, 16, True))


@pytest.mark.parametrize("build", [timm_in_open_clip, clip_of_transformers, siglip_of_transformers])
def test_blocks_of_timm_and_transformers_are_rounded_likewise(build: Callable[[], DualEncoder]) -> None:
    torch.manual_seed(0)
    encoder = build().eval()
    assert gains_by_bf16(encoder)
    half = bf16_copy(encoder)
    rounded = {name for name, tensor in half.weights().items() if tensor.dtype == torch.bfloat16}
    places = re.compile(r"(blocks|resblocks|layers)\.\d+\.(attn|self_attn|mlp)\.")
    assert rounded == {name for name in encoder.weights() if places.search(name)}
    assert {"image" if "vis" in name else "text" for name in rounded} == {"image", "text"}
    size = encoder.image_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenize(["a dog", "two cats on a red sofa"])
    with torch.inference_mode():
        for a, b in (
            (encoder.encode_image(images), half.encode_image(images)),
            (encoder.encode_text(tokens), half.encode_text(tokens)),
        ):
            assert b.dtype == torch.float32 and not torch.equal(a, b)
            assert torch.cosine_similarity(a, b).min() > 0.9998


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'fp8'"):
        pick_precision("fp8", CPU)  # type: ignore[arg-type]


def test_the_reference_decoder_sees_what_open_clip_sees(model: str, photos: list[Path]) -> None:
    import open_clip

    reference = load_embedder(model, "cpu", decode="reference")
    theirs, _, transform = open_clip.create_model_and_transforms(model)
    pixels = torch.stack([transform(Image.open(path)) for path in photos])
    with torch.inference_mode():
        expected = theirs.eval().encode_image(pixels, normalize=True)
    torch.testing.assert_close(reference.embed_images(photos), expected, rtol=0, atol=2e-6)
    chunks = iterate_images(photos, reference.encoder.preprocess, batch_size=8, reference=True, exif="ignore")
    mean, std = reference.encoder.mean, reference.encoder.std
    assert torch.equal((next(chunks).images.float() / 255 - mean) / std, pixels)


def test_features_of_another_precision_or_decoder_are_not_taken_from_the_cache(
    model: str, photos: list[Path], tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    plain = open_source(model, "cpu", cache).embed_images(photos)
    half = open_source(model, "cpu", cache, precision="bf16").embed_images(photos)
    other = open_source(model, "cpu", cache, decode="reference").embed_images(photos)
    assert not torch.equal(plain, half) and not torch.equal(plain, other)  # EXIF turns every photograph
    again = open_source(model, "cpu", cache, decode="reference")
    assert torch.equal(again.embed_images(photos), other)
    assert "embedder" not in vars(again)  # found without the model
    assert again.card.fingerprint.differences(open_source(model, "cpu", cache).card.fingerprint)
