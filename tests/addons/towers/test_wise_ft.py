from pathlib import Path
from typing import Any

import pytest
import torch

from vlkit.addons.passes import editing
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.towers.wise_ft import WiseFt
from vlkit.errors import ConfigError, ModelError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder
from vlkit.models.load import load_encoder
from vlkit.models.weight_space import interpolate

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TEXTS = ["a dog", "two cats"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("start", "tuned", "wider")):
        torch.manual_seed(seed)
        wide = {"embed_dim": 24} if name == "wider" else {}
        save_encoder(build_encoder(ARCHITECTURE | wide), folder / name)
    return {name: folder / name for name in ("start", "tuned", "wider")}


@pytest.fixture
def source(models: dict[str, Path]) -> CachedEmbedder:
    from vlkit.models.embedder import Embedder

    model = Embedder(load_encoder(f"local-dir:{models['start']}"), "start")
    return CachedEmbedder(lambda: model, None, card_of(model))


def outputs(encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return encoder.encode_image(images), encoder.encode_text(encoder.tokenize(TEXTS))


def test_the_ends_are_both_models_and_between_is_their_mixture(source: CachedEmbedder, models: dict[str, Path]) -> None:
    encoder, tuned = source.embedder.encoder, load_encoder(f"local-dir:{models['tuned']}")
    before = outputs(encoder)
    for alpha, expected in ((0.0, before), (1.0, outputs(tuned)), (0.3, outputs(interpolate(encoder, tuned, 0.3)))):
        pipeline = Pipeline([WiseFt(f"local-dir:{models['tuned']}", alpha)]).fit(Reference(), source)
        with editing(encoder, pipeline.tower_edits):
            inside = outputs(encoder)
        assert all(torch.equal(one, other) for one, other in zip(inside, expected, strict=True)), alpha
        # Texts go through the mixed tower too.
        assert torch.allclose(pipeline.source(source).embed_texts(TEXTS), expected[1], atol=1e-6)
    assert not torch.allclose(before[0], inside[0], atol=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(outputs(encoder), before, strict=True))  # put back


def test_the_model_is_put_back_after_an_error(source: CachedEmbedder, models: dict[str, Path]) -> None:
    encoder = source.embedder.encoder
    before = outputs(encoder)
    edits = Pipeline([WiseFt(f"local-dir:{models['tuned']}")]).fit(Reference(), source).tower_edits
    with pytest.raises(ZeroDivisionError), editing(encoder, edits):
        raise ZeroDivisionError
    assert all(torch.equal(one, other) for one, other in zip(outputs(encoder), before, strict=True))


def test_what_cannot_be(source: CachedEmbedder, models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="wise_ft needs the fine-tuned model"):
        Pipeline([WiseFt()]).fit(Reference(), source)
    with pytest.raises(ModelError, match="one and the same architecture"):
        Pipeline([WiseFt(f"local-dir:{models['wider']}")]).fit(Reference(), source)
