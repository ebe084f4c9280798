"""Views for test-time augmentation: which pixels they are, and that they are stored and brought up to date."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlkit.data.records import ImageRef, Record, Source
from vlkit.errors import ConfigError, DataError, GalleryError
from vlkit.features.embed import embed_source
from vlkit.features.source import CachedEmbedder
from vlkit.features.store import open_features
from vlkit.features.views import cut_views, embed_views, square_size
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def model() -> CachedEmbedder:
    torch.manual_seed(0)
    embedder = Embedder(build_encoder(SMALL).eval(), "small")
    return CachedEmbedder(lambda: embedder, None)


def source_in(folder: Path, count: int) -> Source:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if not (folder / f"{number}.png").exists():
            Image.fromarray(pixels).save(folder / f"{number}.png")
    records = [Record(f"{n}.png", ImageRef(path=str(folder / f"{n}.png"))) for n in range(count)]
    return Source(tuple(records), "folder", folder)


def test_views_are_the_crops_and_their_mirror_images() -> None:
    square = torch.arange(3 * 8 * 8).reshape(1, 3, 8, 8).to(torch.uint8)
    assert (square_size(224, "ten-crop"), square_size(7, "ten-crop"), square_size(224, "flip")) == (256, 8, 224)
    views = cut_views(square, 6, "ten-crop")[0]
    assert views.shape == (10, 3, 6, 6)
    corners = [view[0, 0, 0].item() for view in views[:5]]
    assert corners == [0, 2, 16, 18, 9]  # rows of 8: the four corners, then the centre
    for crop, mirrored in zip(views[:5], views[5:], strict=True):
        assert torch.equal(mirrored, crop.flip(-1))
    flips = cut_views(square, 8, "flip")[0]
    assert torch.equal(flips[0], square[0]) and torch.equal(flips[1], square[0].flip(-1))


def test_features_of_views_are_those_of_their_pixels(model: CachedEmbedder, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", 3)
    embedder = model.embedder
    found = embed_views(embedder, source.records, "ten-crop", batch_size=20, workers=0)
    # The photographs are 32 pixels wide, 8/7 of the model's 28: nothing is resized.
    for row, record in enumerate(source.records):
        pixels = torch.from_numpy(np.array(Image.open(record.image.path or ""))).permute(2, 0, 1)
        with torch.no_grad():
            centre = embedder.encoder.encode_image(pixels[None, :, 2:30, 2:30])
            mirrored = embedder.encoder.encode_image(pixels[None, :, :28, 4:32].flip(-1))
        torch.testing.assert_close(found[row, 4], centre[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[row, 6], mirrored[0], rtol=0, atol=1e-5)
    flipped = embed_views(embedder, source.records, "flip", workers=0)
    torch.testing.assert_close(flipped[:, 0], embedder.embed_images(source.records), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["flip", "ten-crop"])
def test_views_are_stored_and_brought_up_to_date(model: CachedEmbedder, tmp_path: Path, recipe: Any) -> None:
    out = tmp_path / "out"
    embed_source(source_in(tmp_path / "photos", 3), model, out, views=recipe, part_size=2, workers=0)
    features = open_features(out).images(views=True)
    assert features.views is not None
    source = source_in(tmp_path / "photos", 3)
    expected = embed_views(model.embedder, source.records, recipe, workers=0)
    torch.testing.assert_close(features.views, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.views.norm(dim=-1), torch.ones(3, expected.shape[1]))
    # The mean of the views is a feature like the others, and none of them.
    mean = F.normalize(features.views.mean(1), dim=-1)
    assert (mean * features.pooled).sum(-1).min() > 0.9 and not torch.allclose(mean, features.pooled)
    more = embed_source(source_in(tmp_path / "photos", 5), model, out, views=recipe, update=True, workers=0)
    assert (more.num_copied, more.num_embedded) == (3, 2)
    views = open_features(out).images(views=True).views
    assert views is not None and torch.equal(views[:3], features.views)


def test_what_does_not_go_together_is_refused(model: CachedEmbedder, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", 2)
    embed_source(source, model, tmp_path / "out", workers=0)
    with pytest.raises(GalleryError, match="holds no views"):
        open_features(tmp_path / "out").images(views=True)
    with pytest.raises(GalleryError, match="was begun without --views, this is --views flip"):
        embed_source(source, model, tmp_path / "out", views="flip", workers=0)
    with pytest.raises(ConfigError, match="ten-crop"):
        embed_source(source, model, tmp_path / "other", views="tencrop", workers=0)  # type: ignore[arg-type]
    (tmp_path / "photos" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Image 0 of 2"):
        embed_views(model.embedder, source.records, "flip", workers=0)
