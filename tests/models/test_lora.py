"""LoRA: nothing at the start, the update worked out by hand, exact merging, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlkit.errors import ModelError
from vlkit.models.lora import add_lora, has_lora, merge_updates, merged_weights, remove_lora
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
ALL = ("q", "k", "v", "o", "mlp")


@pytest.fixture
def encoder() -> OpenClipEncoder:
    torch.manual_seed(0)
    return build_encoder(ARCHITECTURE)


def outputs(encoder: OpenClipEncoder) -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return encoder.encode_image(images), encoder.encode_text(encoder.tokenize(["a red thing", "nothing at all"]))


def same_outputs(encoder: OpenClipEncoder, expected: tuple[Tensor, Tensor]) -> bool:
    # Up to roundings: torch picks its kernels by what is trained and where tensors lie, also for equal weights.
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(outputs(encoder), expected, strict=True))


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def disturb(encoder: OpenClipEncoder) -> None:
    for name, parameter in encoder.named_parameters():
        if ".up." in name:
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("o",), ("mlp",), ALL])
def test_changes_nothing_at_the_start_and_is_merged_exactly(encoder: OpenClipEncoder, targets: tuple[str, ...]) -> None:
    stock, before = outputs(encoder), {name: value.clone() for name, value in encoder.weights().items()}
    parameters = add_lora(encoder, rank=3, targets=targets)  # type: ignore[arg-type]
    assert len(parameters) == len(set(parameters))
    assert same_weights(merged_weights(encoder), before) and same_outputs(encoder, stock)
    disturb(encoder)
    adapted = outputs(encoder)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(adapted, stock, strict=True))
    merged, plain = merged_weights(encoder), build_encoder(ARCHITECTURE)
    # What the blocks compute with is what is saved, bit for bit.
    block = encoder.vision_tower.blocks[1].module
    assert torch.equal(block.attn.in_proj_weight, merged["visual.transformer.resblocks.1.attn.in_proj_weight"])
    assert torch.equal(block.mlp.c_fc.weight, merged["visual.transformer.resblocks.1.mlp.c_fc.weight"])
    plain.model.load_state_dict(merged)
    assert same_outputs(plain, adapted)
    # And the same in place, which leaves an ordinary encoder.
    remove_lora(encoder)
    assert not has_lora(encoder) and same_weights(encoder.weights(), merged) and same_outputs(encoder, adapted)


def test_the_update_of_q_and_v_worked_out_by_hand(encoder: OpenClipEncoder) -> None:
    before = encoder.weights()["visual.transformer.resblocks.1.attn.in_proj_weight"].clone()
    add_lora(encoder, rank=2, alpha=6.0, towers=["image"], targets=["q", "v"])
    disturb(encoder)
    named = dict(encoder.named_parameters())
    place = "model.visual.transformer.resblocks.1.attn.parametrizations.in_proj_weight.0"
    after = merged_weights(encoder)["visual.transformer.resblocks.1.attn.in_proj_weight"] - before
    for number, rows in enumerate((slice(0, 32), slice(64, 96))):
        update = 3.0 * named[f"{place}.up.{number}"] @ named[f"{place}.down.{number}"]
        torch.testing.assert_close(after[rows], update, rtol=1e-5, atol=1e-6)
    assert not after[32:64].any()  # k
    assert not any("parametrizations" in name for name in named if ".text." in name)


def test_only_the_updates_and_the_temperature_are_trained(encoder: OpenClipEncoder) -> None:
    parameters = add_lora(encoder, rank=3, targets=ALL)  # type: ignore[arg-type]
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(parameters) + 1 and sum("logit_scale" in name for name in trained) == 1
    # Each block: two matrices for each of q, k, v, o and the two of the MLP; two blocks in each of two towers.
    assert len(parameters) == 2 * 6 * 2 * 2
    image, text = outputs(encoder.train())
    (image.sum() + text.sum()).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert all(p.grad is None for n, p in encoder.named_parameters() if n not in trained)


def test_saved_weights_are_merged_without_the_settings(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    add_lora(encoder, rank=2, alpha=5.0, targets=["k", "mlp"])
    disturb(encoder)
    save_file({name: value.contiguous() for name, value in encoder.weights().items()}, tmp_path / "raw.safetensors")
    merged = merge_updates(load_file(tmp_path / "raw.safetensors"))
    for name, value in merged_weights(encoder).items():
        assert torch.equal(merged[name], value), name


def test_dropping_the_updates_gives_the_stock_model_back(encoder: OpenClipEncoder) -> None:
    before = {name: value.clone() for name, value in encoder.weights().items()}
    add_lora(encoder)
    disturb(encoder)
    remove_lora(encoder, merge=False)
    assert same_weights(encoder.weights(), before)


def test_what_is_refused(encoder: OpenClipEncoder) -> None:
    with pytest.raises(ModelError, match=r"rank 40 is no low rank for a matrix of \(96, 32\)"):
        add_lora(encoder, rank=40)
    add_lora(build_encoder(ARCHITECTURE))
    again = build_encoder(ARCHITECTURE)
    add_lora(again)
    with pytest.raises(ModelError, match="has LoRA updates already"):
        add_lora(again)
    resnet = {**ARCHITECTURE, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}}
    with pytest.raises(ModelError, match="a ResNet"):
        add_lora(build_encoder(resnet))
