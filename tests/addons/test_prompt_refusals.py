"""What prompt learners refuse, in words: another model, names too long, another tokenizer, training that diverges."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.class_names import parse_class
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.registry import make_addon
from vlkit.addons.saved import load_addon, save_addon
from vlkit.errors import ConfigError, GalleryError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder

SHORT = "epochs=2,crop=1,batch_size=6"
IN_TEXT = ("coop:context=2,epochs=2", "cocoop:epochs=1,batch_size=6", "pouf:epochs=1", "upl:context=2,runs=1,epochs=1")
IN_TOWERS = (f"maple:{SHORT}", f"prompt_src:{SHORT},templates=photo", f"pouf_full:{SHORT}")


@pytest.fixture
def reference(tower_case: Any) -> Any:
    return replace(tower_case.reference, images=replace(tower_case.reference.few_shot, labels=None))


@pytest.fixture(scope="module")
def stranger() -> CachedEmbedder:
    """A model of the same shape with other weights."""
    torch.manual_seed(7)
    vision = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2}
    embedder = Embedder(build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}).eval(), "stranger")
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


@pytest.mark.parametrize("spec", ["coop:context=2,epochs=1", f"maple:{SHORT}", "pixel_prompt:epochs=1,crop=1"])
def test_saved_prompts_belong_to_their_encoder(
    spec: str, tower_case: Any, reference: Any, stranger: CachedEmbedder, tmp_path: Any
) -> None:
    fitted = Pipeline([make_addon(spec)]).fit(reference, tower_case.source, "photo")
    again = Pipeline([load_addon(save_addon(fitted.addons[0], tmp_path / "saved"))])
    again.classifier(reference.class_names, tower_case.source, "photo")
    name = spec.partition(":")[0]
    with pytest.raises(GalleryError, match=rf"The add-on {name} .*do not go together: weights"):
        again.classifier(reference.class_names, stranger, "photo")


@pytest.mark.parametrize("spec", [*IN_TEXT, *IN_TOWERS])
def test_names_longer_than_the_context_leaves_room_for_are_named(spec: str, tower_case: Any, reference: Any) -> None:
    long = " ".join(["very"] * 17) + " long"
    missing = ",missing=accept" if spec.startswith("upl") else ""
    given = replace(reference, class_names=(*reference.class_names[:2], parse_class(long)))
    with pytest.raises(ConfigError, match=r"1 of 4 class names are too long: 'very very .*takes 20 tokens"):
        Pipeline([make_addon(spec + missing)]).fit(given, tower_case.source, "{}")


@pytest.mark.parametrize("spec", [IN_TEXT[0], IN_TOWERS[0], IN_TOWERS[2]])
def test_another_rule_for_the_end_of_a_text(
    spec: str, tower_case: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_case.encoder.tokenize, "tokenizer_id", "hf:bert")
    with pytest.raises(ConfigError, match="its rule for the end-of-text token; this model has hf:bert"):
        make_addon(spec).fit(reference, tower_case.source)


@pytest.mark.parametrize("spec", ["coop:context=2,epochs=3", "pouf:epochs=3", *IN_TOWERS])
def test_training_that_diverges_says_where_and_leaves_the_model_alone(
    spec: str, tower_case: Any, reference: Any
) -> None:
    before = {name: value.clone() for name, value in tower_case.encoder.state_dict().items()}
    with pytest.raises(ConfigError, match=r"diverged in step \d+ of \d+: loss nan at learning rate .* Lower lr"):
        Pipeline([make_addon(f"{spec},lr=1e38")]).fit(reference, tower_case.source, "photo")
    after = tower_case.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(one.requires_grad and one.grad is None for one in tower_case.encoder.parameters())
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in tower_case.encoder.modules())
