"""The list of models, read without open_clip, against open_clip."""

import subprocess
import sys

import open_clip
import pytest

from vlkit.errors import ModelError
from vlkit.models import catalogue


def test_names_and_tags_are_open_clips() -> None:
    assert set(catalogue.architectures()) == set(open_clip.list_models())
    for name in ("ViT-B-32", "ViT-B-16-SigLIP", "ViT-B-32-plus-256"):
        assert catalogue.pretrained_tags(name) == open_clip.list_pretrained_tags_by_model(name)
        assert catalogue.architecture(name) == open_clip.get_model_config(name)
    offered = {(offer.architecture, offer.tag) for offer in catalogue.offers() if offer.tag}
    assert offered == set(open_clip.list_pretrained())


def test_the_list_is_read_without_importing_open_clip() -> None:
    code = (
        "import sys; from vlkit.models import catalogue; assert len(catalogue.offers('b-32')) > 20; "
        "from vlkit.models.tokenizers import get_tokenizer, CLIP_BPE; get_tokenizer(CLIP_BPE).encode_ragged(['a']); "
        "assert not {'open_clip', 'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes_of_an_offer() -> None:
    (offer,) = catalogue.offers("ViT-B-32/laion2b_s34b_b79k")
    assert offer.name == "open_clip:ViT-B-32/laion2b_s34b_b79k"
    assert (offer.embed_dim, offer.image_size, offer.context_length) == (512, 224, 77)
    # open_clip's docs/model_profile.csv: 151.28 M in all
    assert (offer.image_parameters or 0) + (offer.text_parameters or 0) == 151_277_312


def test_mistyped_names_and_tags() -> None:
    with pytest.raises(ModelError, match="Did you mean ViT-B-32"):
        catalogue.offers("ViTB32")
    with pytest.raises(ModelError, match="Did you mean laion2b_s34b_b79k"):
        catalogue.pretrained_record("ViT-B-32", "laion2b_s34b")
    with pytest.raises(ModelError, match="publishes none"):
        catalogue.pretrained_record("ViT-B-32-plus-256", "openai")


def test_where_weights_come_from() -> None:
    place = catalogue.weights_file(catalogue.pretrained_record("ViT-B-32", "laion2b_s34b_b79k"))
    assert place.origin.endswith("/laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    assert place.file_names == ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    named = catalogue.weights_file({"hf_hub": "org/name/file.bin"})
    assert named.file_names == ("file.safetensors", "file.bin") and named.on_disk is None
    address = catalogue.weights_file({"url": "https://example.org/a/b.pt"})
    assert address.file_names == ("b.pt",)
