"""Every feature against open_clip's own: whole, by stages, cut to the longest text, and from every kind of tower."""

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import ImageTextBatch
from vlkit.errors import ModelError
from vlkit.models.dual_encoder import parameters_per_tower
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder

TEXTS = ["a dog", "a photo of a very small cat on the mat", "", "word " * 60]
TEXT = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "quickgelu_eos": {
        "embed_dim": 16,
        "vision_cfg": {**VIT, "ls_init_value": 0.1, "qk_norm": True},
        "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407},
        "quick_gelu": True,
    },
    "first": {"embed_dim": 16, "vision_cfg": {**VIT, "pool_type": "avg"}, "text_cfg": {**TEXT, "pool_type": "first"}},
    "siglip": {
        "embed_dim": 16,
        "vision_cfg": {**VIT, "pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True, "proj_bias": True},
        "init_logit_bias": -10.0,
        "init_logit_scale": 2.3,
    },
    "last_causal": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {**TEXT, "pool_type": "last"}},
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
        "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1, "context_length": 40},
    },
}
STOPS_AT_END = ("clip", "quickgelu_eos", "first", "resnet", "timm")
WITH_VISION_TOWER = ("clip", "quickgelu_eos", "first", "siglip", "last_causal")


@pytest.fixture(scope="module")
def encoders() -> dict[str, OpenClipEncoder]:
    torch.manual_seed(0)
    return {name: build_encoder(config).eval() for name, config in ARCHITECTURES.items()}


@pytest.fixture(scope="module")
def vit_b_32() -> tuple[Any, OpenClipEncoder]:
    reference = open_clip.create_model("ViT-B-32", force_custom_text=True, pretrained=None).eval()
    encoder = build_encoder("ViT-B-32").eval()
    encoder.model.load_state_dict(reference.state_dict())
    return reference, encoder


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def as_open_clip(encoder: OpenClipEncoder, images: Tensor) -> Tensor:
    """ToTensor and Normalize of open_clip's own transform."""
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**encoder.record()["preprocess_cfg"]), is_train=False
    )
    return transform.transforms[-1](images / 255)


def full_tokens(texts: list[str], context_length: int = 40) -> Tensor:
    return open_clip.SimpleTokenizer(context_length=context_length)(texts)


@torch.no_grad()
def test_vit_b_32_equals_open_clip(vit_b_32: tuple[Any, OpenClipEncoder]) -> None:
    reference, encoder = vit_b_32
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    pixels = as_open_clip(encoder, images)
    torch.testing.assert_close(
        encoder.encode_image(images), reference.encode_image(pixels, normalize=True), atol=1e-5, rtol=0
    )
    tokens = full_tokens(TEXTS, 77)
    expected = reference.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_text(tokens), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_text(encoder.tokenize(TEXTS)), expected, atol=1e-5, rtol=0)
    dense = reference.visual.forward_intermediates(
        pixels, indices=1, output_fmt="NLC", normalize_intermediates=True, output_extra_tokens=True
    )["image_intermediates"][-1]
    torch.testing.assert_close(encoder.patch_tokens(images), dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        encoder.encode_patches(images, normalize=False), dense @ reference.visual.proj, atol=1e-5, rtol=0
    )
    assert encoder.logit_scale().item() == pytest.approx(1 / 0.07)


def test_zero_shot_weights_of_vit_b_32_equal_open_clip(vit_b_32: tuple[Any, OpenClipEncoder]) -> None:
    reference, encoder = vit_b_32
    names, templates = ["dog", "fire engine", "cat"], ["a photo of a {}.", "{}", "art of the {}, very large."]
    expected = open_clip.build_zero_shot_classifier(reference, open_clip.SimpleTokenizer(), names, templates)
    prompts = [template.format(name) for name in names for template in templates]
    embeddings = Embedder(encoder, "test").embed_texts(prompts)
    weights = F.normalize(embeddings.reshape(3, 3, -1).mean(dim=1), dim=-1)
    torch.testing.assert_close(weights, expected.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_features_equal_open_clip(name: str, encoders: dict[str, OpenClipEncoder], images: Tensor) -> None:
    encoder = encoders[name]
    model: Any = encoder.model
    expected = model.encode_image(as_open_clip(encoder, images), normalize=True)
    torch.testing.assert_close(encoder.encode_image(images), expected, atol=1e-5, rtol=0)
    expected = model.encode_text(full_tokens(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.encode_text(full_tokens(TEXTS)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_text(encoder.tokenize(TEXTS)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_texts_without_padding_give_the_same(name: str, encoders: dict[str, OpenClipEncoder]) -> None:
    encoder = encoders[name]
    short = TEXTS[:3]
    tokens = encoder.tokenize(short)
    assert tokens.shape[1] == (12 if name in STOPS_AT_END else 40)
    longest = encoder.tokenize.pad(encoder.tokenize.encode_ragged(short))[:, :12]
    expected = encoder.model.encode_text(full_tokens(short), normalize=True)  # type: ignore[operator]
    torch.testing.assert_close(encoder.encode_text(longest), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WITH_VISION_TOWER)
@torch.no_grad()
def test_stages_give_what_the_towers_give(name: str, encoders: dict[str, OpenClipEncoder], images: Tensor) -> None:
    encoder = encoders[name]
    model: Any = encoder.model
    tower = encoder.vision_tower
    x = tower.embed(images)
    assert x.shape == (3, 1 + tower.grid[0] * tower.grid[1], 64)
    for block in tower.blocks:
        x = block(x)
    torch.testing.assert_close(tower.finish(x), model.visual(as_open_clip(encoder, images)), atol=1e-6, rtol=0)

    tokens = full_tokens(TEXTS)
    text = encoder.text_tower
    x = text.embed(tokens)
    for block in text.blocks:
        x = block(x)
    torch.testing.assert_close(text.finish(x, tokens), model.text(tokens), atol=1e-6, rtol=0)
    assert [block.module for block in text.blocks] == list(model.text.transformer.resblocks)


@pytest.mark.parametrize("name", ["clip", "quickgelu_eos", "siglip"])
@torch.no_grad()
def test_patches_equal_open_clips_output_tokens(
    name: str, encoders: dict[str, OpenClipEncoder], images: Tensor
) -> None:
    encoder = encoders[name]
    visual: Any = encoder.model.visual
    visual.output_tokens = True
    _, tokens = visual(as_open_clip(encoder, images))
    visual.output_tokens = False
    torch.testing.assert_close(encoder.patch_tokens(images), tokens, atol=1e-6, rtol=0)


@torch.no_grad()
def test_mean_of_projected_patches_is_the_feature_of_a_mean_pooled_tower(
    encoders: dict[str, OpenClipEncoder], images: Tensor
) -> None:
    encoder = encoders["first"]
    patches = encoder.encode_patches(images, normalize=False)
    expected = encoder.encode_image(images, normalize=False)
    torch.testing.assert_close(patches.mean(dim=1), expected, atol=1e-5, rtol=0)
    assert encoder.encode_patches(images).norm(dim=-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "called"), [("resnet", "a ResNet"), ("timm", "a timm model"), ("coca", "an attention-pooled ViT")]
)
def test_towers_without_patches_say_so(
    name: str, called: str, encoders: dict[str, OpenClipEncoder], images: Tensor
) -> None:
    encoder = encoders[name]
    assert not {"patches", "patch_tokens", "vision_tower"} & encoder.gives
    for ask in (encoder.patch_tokens, encoder.encode_patches):
        with pytest.raises(ModelError, match=called):
            ask(images)


def test_what_else_a_tower_cannot_give(encoders: dict[str, OpenClipEncoder], images: Tensor) -> None:
    with pytest.raises(ModelError, match="normalises after pooling"):
        encoders["siglip"].encode_patches(images)
    with pytest.raises(ModelError, match="CoCa"):
        encoders["coca"].encode_words(full_tokens(TEXTS))
    dropping = build_encoder(ARCHITECTURES["clip"], patch_dropout=0.5).train()
    assert dropping.encode_image(images).shape == (3, 16)
    with pytest.raises(ModelError, match="Patch dropout"):
        dropping.patch_tokens(images)
    assert dropping.eval().patch_tokens(images).shape == (3, 16, 64)


@torch.no_grad()
def test_words_mask_and_place(encoders: dict[str, OpenClipEncoder]) -> None:
    encoder = encoders["clip"]
    tokens = encoder.tokenize(TEXTS[:3])
    words, mask = encoder.encode_words(tokens, normalize=False)
    assert mask.sum(dim=1).tolist() == [2, 10, 0]  # without start, end and padding
    end = tokens.argmax(dim=1)
    expected = encoder.encode_text(tokens, normalize=False)
    torch.testing.assert_close(words[torch.arange(3), end], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["clip", "resnet", "timm"])
@torch.no_grad()
def test_bytes_and_fractions_are_the_same_image(
    name: str, encoders: dict[str, OpenClipEncoder], images: Tensor
) -> None:
    encoder = encoders[name]
    torch.testing.assert_close(encoder.encode_image(images), encoder.encode_image(images / 255), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 48, 48), "48 pixels wide, this model takes 32"),
        (torch.zeros(2, 1, 32, 32), "expected"),
        (torch.zeros(3, 32, 32), "expected"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "torch.int64"),
    ],
)
def test_wrong_images(images: Tensor, message: str, encoders: dict[str, OpenClipEncoder]) -> None:
    with pytest.raises(ModelError, match=message):
        encoders["clip"].encode_image(images)


def test_too_many_tokens(encoders: dict[str, OpenClipEncoder]) -> None:
    with pytest.raises(ModelError, match="77 tokens; inline takes 40"):
        encoders["clip"].encode_text(full_tokens(TEXTS, 77))


def test_no_texts_and_no_images(encoders: dict[str, OpenClipEncoder]) -> None:
    encoder = encoders["resnet"]
    assert encoder.encode_text(encoder.tokenize([])).shape == (0, 16)
    assert encoder.encode_image(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)).shape == (0, 16)


@torch.no_grad()
def test_a_text_longer_than_the_context_keeps_its_causal_mask(encoders: dict[str, OpenClipEncoder]) -> None:
    # Prompts may make the sequence longer than the model's mask; what comes later must still not be seen.
    tower = encoders["clip"].text_tower
    x = tower.embed(full_tokens(TEXTS[:1]))
    longer = torch.cat([x, torch.randn(1, 7, 32)], dim=1)
    for block in tower.blocks:
        x, longer = block(x), block(longer)
    torch.testing.assert_close(longer[:, :40], x, atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_padding_or_recomputation(encoders: dict[str, OpenClipEncoder]) -> None:
    encoder = encoders["clip"]
    parameters = dict(encoder.model.text.named_parameters())  # type: ignore[union-attr]

    def gradients() -> list[Tensor]:
        loss = encoder.encode_text(tokens)[:, 0].sum()
        return list(torch.autograd.grad(loss, list(parameters.values())))

    tokens = encoder.tokenize(TEXTS[:3])
    ours = gradients()
    encoder.set_grad_checkpointing(True)
    recomputed = gradients()
    encoder.set_grad_checkpointing(False)
    loss = encoder.model.encode_text(full_tokens(TEXTS[:3]), normalize=True)[:, 0].sum()  # type: ignore[operator]
    expected = torch.autograd.grad(loss, list(parameters.values()))
    for name, a, b, c in zip(parameters, ours, recomputed, expected, strict=True):
        torch.testing.assert_close(a, c, atol=1e-6, rtol=1e-4, msg=name)
        torch.testing.assert_close(b, c, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_forward_collects_what_the_methods_give(encoders: dict[str, OpenClipEncoder], images: Tensor) -> None:
    encoder = encoders["clip"]
    batch = ImageTextBatch(
        images=images,
        tokens=encoder.tokenize(TEXTS),
        text_to_image=torch.tensor([0, 0, 1, 2]),
        ids=torch.arange(3),
        caption_hash=torch.arange(4),
        valid=torch.ones(3, dtype=torch.bool),
        extra={},
        keys=["a", "b", "c"],
    )
    plain, local = encoder(batch), encoder(batch, local=True)
    assert plain.patches is None and plain.text_to_image is batch.text_to_image and plain.logit_bias is None
    torch.testing.assert_close(local.image, plain.image)
    torch.testing.assert_close(local.text, plain.text)
    torch.testing.assert_close(local.patches, encoder.encode_patches(images))
    torch.testing.assert_close(local.words, encoder.encode_words(batch.tokens)[0])
    assert plain.logit_scale.ndim == 0


def test_family_bias_and_scale(encoders: dict[str, OpenClipEncoder]) -> None:
    siglip = encoders["siglip"]
    assert siglip.training_family == "sigmoid" and "logit_bias" in siglip.gives
    assert siglip.logit_bias is not None and siglip.logit_bias.shape == () and siglip.logit_bias.item() == -10
    assert siglip.logit_scale().item() == pytest.approx(9.974, abs=1e-3)
    assert encoders["clip"].training_family == "softmax" and encoders["clip"].logit_bias is None
    assert build_encoder(ARCHITECTURES["clip"], init_logit_bias=-10).training_family == "sigmoid"
    wide = build_encoder({**ARCHITECTURES["siglip"], "nonscalar_logit_scale": True})
    assert wide.logit_scale().shape == () and wide.logit_bias is not None and wide.logit_bias.shape == ()


def test_parameters_per_tower_counts_what_is_trained(encoders: dict[str, OpenClipEncoder]) -> None:
    encoder = build_encoder(ARCHITECTURES["resnet"])
    for parameter in encoder.model.visual.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    counts = parameters_per_tower(encoder)
    assert list(counts) == ["image", "text", "logit_scale"]
    assert counts["image"].trainable == 0 < counts["image"].total
    assert counts["text"].trainable == counts["text"].total
    assert sum(count.total for count in counts.values()) == sum(p.numel() for p in encoder.parameters())


def test_random_weights_come_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first = build_encoder(ARCHITECTURES["resnet"]).weights()
    torch.manual_seed(3)
    second = build_encoder(ARCHITECTURES["resnet"]).weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_many_texts_sorted_by_length_give_the_features_of_one_by_one() -> None:
    encoder = build_encoder({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}).eval()
    texts = [" ".join(["word"] * (1 + (7 * i) % 17)) for i in range(100)]
    with torch.inference_mode():
        together = encoder.encode_text(encoder.tokenize(texts))
        single = torch.cat([encoder.encode_text(encoder.tokenize([text])) for text in texts])
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)
