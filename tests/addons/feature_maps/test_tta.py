import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlkit.addons.adapt import captioned_reference
from vlkit.addons.exchange import Vectors, no_vectors
from vlkit.addons.feature_maps.distribution_norm import DistributionNorm
from vlkit.addons.feature_maps.tta import AveragedViews
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.views import TEST_VIEWS
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    model = Embedder(build_encoder(ARCHITECTURE).eval(), "tiny")
    return CachedEmbedder(lambda: model, None, card_of(model))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    random = np.random.default_rng(0)

    def encoded() -> bytes:
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    return [Record(f"image {n}", ImageRef(data=encoded()), captions=(f"picture {n}",)) for n in range(6)]


def test_it_is_the_mean_over_views_of_the_tower(source: CachedEmbedder, records: list[Record]) -> None:
    pipeline = Pipeline([AveragedViews()]).fit(Reference(task="retrieval"), source)
    assert pipeline.views == TEST_VIEWS
    read = Passes(source).read(records, pipeline.edits, pipeline.views).vectors
    mapped, _ = pipeline.map(read, no_vectors("text", 16))
    assert read.views is not None and torch.allclose(read.views[:, 0], read.pooled, atol=1e-5)  # view 0 is the image
    for row in range(len(records)):
        total = torch.zeros(16)
        for view in read.views[row]:
            total += view / view.norm()
        assert torch.allclose(mapped.pooled[row], total / total.norm(), atol=1e-5)
    assert not torch.allclose(mapped.pooled, read.pooled, atol=1e-3)  # the crops count


def test_dn_behind_it_is_fitted_on_averaged_features(source: CachedEmbedder, records: list[Record]) -> None:
    passes = Passes(source)
    reference, _ = captioned_reference(passes, records[:4])
    pipeline = Pipeline([AveragedViews(), DistributionNorm(bank_size=4)]).fit(reference, source)
    views = passes.read(records, recipe=TEST_VIEWS).vectors
    assert views.views is not None
    averaged = F.normalize(views.views.mean(1), dim=-1)
    found = pipeline.maps[1].state().tensors["image_mean"]
    assert torch.allclose(found, averaged[:4].mean(0), atol=1e-5)
    texts = Vectors("text", source.embed_texts(["one", "two"]))
    scores = torch.cat(list(pipeline.retrieval(views, texts, source).scores("image_to_text")))
    mu = pipeline.maps[1].state().tensors["text_mean"]
    assert torch.allclose(scores, (averaged - 0.5 * found) @ (texts.pooled - 0.5 * mu).T, atol=1e-5)
    assert passes.num_images == 4 + 6  # plain for the reference; each in views once, whoever wants them


def test_views_are_changed_by_what_stands_before_it(source: CachedEmbedder, records: list[Record]) -> None:
    reference, _ = captioned_reference(Passes(source), records[:4])
    texts = Vectors("text", source.embed_texts(["one", "two"]))
    pipeline = Pipeline([DistributionNorm(bank_size=4), AveragedViews()]).fit(reference, source)
    read = Passes(source).read(records, recipe=pipeline.views).vectors
    assert read.views is not None
    norm = pipeline.maps[0]
    views = [norm.map(Vectors("image", read.views[:, place]), texts)[0].pooled for place in range(read.views.shape[1])]
    averaged = F.normalize(torch.stack(views).mean(0), dim=-1)
    mapped = norm.map(read, texts)[1].pooled
    scores = torch.cat(list(pipeline.retrieval(read, texts, source).scores("image_to_text")))
    assert torch.allclose(scores, averaged @ mapped.T, atol=1e-5)
    unchanged = F.normalize(read.views.mean(1), dim=-1) @ mapped.T
    assert not torch.allclose(scores, unchanged, atol=1e-3), "without the views' own correction it would be lost"


def test_share_zero_is_the_image_and_missing_views_are_an_error(tiny_source: Callable[..., Any]) -> None:
    images, texts = Vectors("image", F.normalize(torch.randn(3, 16), dim=-1)), no_vectors("text", 16)
    reference = Reference(task="retrieval")
    off = AveragedViews(crops=0.0).fit(reference, tiny_source())
    assert torch.equal(off.map(images, texts)[0].pooled, images.pooled)
    with pytest.raises(ConfigError, match="only one feature of each is there"):
        AveragedViews().fit(reference, tiny_source()).map(images, texts)
    with pytest.raises(ConfigError, match="crops = 2"):
        AveragedViews(crops=2.0).fit(reference, tiny_source())
