import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlkit.addons.base import InputEdit, TowerEdit
from vlkit.addons.passes import EditedSource, Passes, editing
from vlkit.addons.views import TEN_CROPS, ViewRecipe
from vlkit.data.records import ImageRef, Record
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Dark(InputEdit):
    by: float = 0.5

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def edit_image(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32 and images.max() <= 1
        return images * self.by


@dataclass(frozen=True)
class Louder(TowerEdit):
    towers: ClassVar[frozenset[Any]] = frozenset({"image", "text"})
    by: float = 3.0

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    @contextmanager
    def edit(self, encoder: Any) -> Iterator[None]:
        weights = [next(tower.blocks[0].module.parameters()) for tower in (encoder.vision_tower, encoder.text_tower)]
        before = [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data * self.by
            yield
        finally:
            for weight, data in zip(weights, before, strict=True):
                weight.data = data


@pytest.fixture(scope="module")
def source() -> CachedEmbedder:
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    model = Embedder(build_encoder(ARCHITECTURE).eval(), "tiny")
    return CachedEmbedder(lambda: model, None, card_of(model))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        found.append(Record(f"{number}.png", ImageRef(data=file.getvalue()), captions=(f"number {number}",)))
    return [*found[:3], Record("broken.png", ImageRef(data=b"no image")), *found[3:]]


def test_each_image_goes_once_through_each_kind_of_pass(source: CachedEmbedder, records: list[Record]) -> None:
    passes = Passes(source, batch_size=2)
    first = passes.read(records[:3])
    whole = passes.read(records)  # only the new ones are encoded
    assert (passes.num_passes, passes.num_images) == (2, 6)
    assert whole.kept == [0, 1, 2, 4, 5] and whole.failures[0][0] == 3 and "broken.png" in whole.failures[0][1]
    assert torch.equal(passes.read(list(reversed(records))).vectors.pooled, whole.vectors.pooled.flip(0))
    assert torch.equal(first.vectors.pooled, whole.vectors.pooled[:3])
    for _ in range(20):  # twenty add-ons on plain features
        passes.read(records)
    assert passes.num_images == 6
    passes.read(records, recipe=TEN_CROPS)
    passes.read(records, recipe=ViewRecipe(10))  # equal recipes are one
    passes.read(records, edits=(Dark(),))
    passes.read(records, edits=(Dark(0.5),))
    passes.read(records, edits=(Dark(0.6),))
    assert (passes.num_passes, passes.num_images) == (5, 24)


def test_plain_vectors_are_those_of_the_embedder(source: CachedEmbedder, records: list[Record]) -> None:
    readable = [record for record in records if record.key != "broken.png"]
    expected = source.embedder.embed_images(readable)
    plain = Passes(source).read(readable).vectors
    local = Passes(source, local=True).read(readable).vectors
    assert torch.equal(plain.pooled, expected) and plain.patches is None
    assert torch.allclose(local.pooled, expected, atol=1e-6) and torch.allclose(local.raw, plain.raw, atol=1e-5)
    assert local.patches is not None and local.patches.shape == (5, 16, 16) and local.grid == (4, 4)
    assert local.patch_tokens is not None and local.patch_tokens.shape == (5, 16, 32)
    assert not plain.pooled.is_inference()  # methods train on them


def test_edits_change_features_and_leave_the_model_as_it_was(source: CachedEmbedder, records: list[Record]) -> None:
    readable = records[:3]
    before, texts = source.embedder.embed_images(readable), source.embed_texts(["a cat"])
    passes = Passes(source)
    dark, loud = passes.read(readable, (Dark(),)).vectors, passes.read(readable, (Louder(),)).vectors
    assert not torch.allclose(dark.pooled, before, atol=1e-3)
    assert not torch.allclose(loud.pooled, before, atol=1e-3)
    edited = EditedSource(source, (Dark(), Louder()))
    assert torch.allclose(edited.embed_images(readable), passes.read(readable, (Dark(), Louder())).vectors.pooled)
    assert not torch.allclose(edited.embed_texts(["a cat"]), texts, atol=1e-4)
    assert torch.equal(EditedSource(source, (Dark(),)).embed_texts(["a cat"]), texts)
    assert torch.equal(source.embedder.embed_images(readable), before)
    assert torch.equal(source.embed_texts(["a cat"]), texts)
    with pytest.raises(RuntimeError, match="stop"), editing(source.embedder.encoder, (Louder(),)):
        raise RuntimeError("stop")
    assert torch.equal(source.embedder.embed_images(readable), before)


def test_views_do_not_depend_on_the_place_in_the_list(source: CachedEmbedder, records: list[Record]) -> None:
    recipe = ViewRecipe(4, plain_first=True)
    whole = Passes(source).read(records, recipe=recipe).vectors
    alone = Passes(source).read([records[5]], recipe=recipe).vectors
    assert whole.views is not None and alone.views is not None and whole.views.shape == (5, 4, 16)
    assert torch.allclose(whole.views[4], alone.views[0], atol=1e-6)
    assert torch.allclose(whole.views[:, 0], whole.pooled, atol=1e-5)  # the plain view
    assert not torch.allclose(whole.views[:, 1], whole.pooled, atol=1e-3)
    other = Passes(source).read(records, recipe=ViewRecipe(4, plain_first=True, seed=1)).vectors
    assert other.views is not None and not torch.allclose(other.views[:, 1], whole.views[:, 1], atol=1e-3)
