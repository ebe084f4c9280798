"""SigLIP and CLIP of transformers: features, preprocessing and tokenizer are what transformers itself gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlkit.errors import ModelError
from vlkit.models.hf_encoder import HfEncoder, load_hf, preprocess_of
from vlkit.models.load import load_embedder

CLIP_PROCESSOR = {
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SiglipModel with a word-level tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "photo": 4, "of": 5, "cat": 6, "dog": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=8
    ).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=tower
        | {"vocab_size": 8, "max_position_embeddings": 8, "projection_size": 32}
        | {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config)
    model.logit_bias.data.fill_(-7.5)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3).save_pretrained(folder)
    return folder


def test_siglip_gives_what_transformers_gives(siglip_folder: Path) -> None:
    from transformers import AutoTokenizer, SiglipModel

    encoder = load_hf(str(siglip_folder))
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    texts = ["a photo of a cat", "dog"]
    ids = AutoTokenizer.from_pretrained(siglip_folder)(texts, padding="max_length", max_length=8, return_tensors="pt")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_text_features(ids["input_ids"]).pooler_output, dim=-1)
        torch.testing.assert_close(encoder.encode_text(encoder.tokenize(texts)), expected, atol=1e-6, rtol=0)
        out = model.get_image_features(pixel_values=(pixels - 0.5) / 0.5).pooler_output
        torch.testing.assert_close(encoder.encode_image(pixels, normalize=False), out, atol=1e-6, rtol=0)
    assert encoder.tokenize(texts).shape == (2, 8), "a SigLIP tower reads padding, so texts come at full length"
    assert encoder.logit_bias is not None and encoder.logit_bias.item() == -7.5
    assert encoder.training_family == "sigmoid"
    assert encoder.preprocess.resize_mode == "squash"
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5)


def test_trimmed_tokens_are_filled_up_again(siglip_folder: Path) -> None:
    encoder = load_hf(str(siglip_folder)).eval()
    full = encoder.tokenize(["dog"])
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(full[:, :2]), encoder.encode_text(full))
    with pytest.raises(ModelError, match="Texts have 9 tokens; this model takes 8"):
        encoder.encode_text(torch.ones(1, 9, dtype=torch.int64))


def test_an_embedder_takes_it(siglip_folder: Path) -> None:
    embedder = load_embedder(f"hf:{siglip_folder}")
    assert embedder.family == "sigmoid"
    assert embedder.embed_texts(["dog", "cat"]).shape == (2, 32)
    assert embedder.identity == load_embedder(f"hf:{siglip_folder}").identity


def test_what_does_not_fit_is_refused(siglip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes images of 32 pixels, not 64"):
        load_hf(str(siglip_folder), image_size=64)
    with pytest.raises(ModelError, match=r"The configuration of hf:.* cannot be loaded"):
        load_hf(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="is a bert model; supported: clip, siglip"):
        load_hf(str(tmp_path))


def test_towers_have_no_way_in(siglip_folder: Path) -> None:
    encoder = load_hf(str(siglip_folder))
    assert isinstance(encoder, HfEncoder)
    for tower in ("text_tower", "vision_tower"):
        with pytest.raises(ModelError, match="Take the same weights from open_clip"):
            getattr(encoder, tower)


def test_processor_of_clip() -> None:
    read = preprocess_of(CLIP_PROCESSOR, "x")
    assert (read.size, read.resize_mode, read.interpolation, read.crop_pct) == (32, "shortest", "bicubic", 1.0)
    larger = preprocess_of({**CLIP_PROCESSOR, "size": {"shortest_edge": 36}, "resample": 2}, "x")
    assert (larger.interpolation, larger.crop_pct) == ("bilinear", 32 / 36)


@pytest.mark.parametrize(
    "change",
    [
        {"do_center_crop": False},
        {"resample": 0},
        {"rescale_factor": 1.0},
        {"crop_size": {"height": 32, "width": 16}},
        {"size": {}, "crop_size": {}, "do_center_crop": False},
    ],
)
def test_processors_that_do_something_else(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"image processor .* is not supported"):
        preprocess_of({**CLIP_PROCESSOR, **change}, "org/name")
