"""A model with its cache: the same features as the model's own, and nothing is encoded twice."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError, ModelError
from vlkit.features.cache import FeatureCache
from vlkit.features.source import CachedEmbedder, open_source
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(9):
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def cached(encoder: Any, folder: Path) -> CachedEmbedder:
    return CachedEmbedder(lambda: Embedder(encoder, "small"), FeatureCache(folder))


def test_a_second_pass_encodes_nothing_and_gives_the_same(counted: Any, photos: list[Path], tmp_path: Path) -> None:
    expected = Embedder(counted, "small").embed_images(photos)
    counted.num_images = 0
    first = cached(counted, tmp_path / "cache").embed_images(photos, batch_size=4)
    assert counted.num_images == 9
    second = cached(counted, tmp_path / "cache").embed_images(photos, batch_size=4)
    assert counted.num_images == 9
    assert second.equal(first) and second.dtype == torch.float32
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)


def test_only_new_images_are_encoded_and_the_order_stays(counted: Any, photos: list[Path], tmp_path: Path) -> None:
    expected = Embedder(counted, "small").embed_images(photos)
    cached(counted, tmp_path / "cache").embed_images(photos[2:7])
    counted.num_images = 0
    seen: list[tuple[int, int]] = []
    source = cached(counted, tmp_path / "cache")
    features = source.embed_images(photos, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert counted.num_images == 4
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    assert seen == sorted(seen) and seen[-1] == (9, 9)
    rows = [row for chunk in source.iterate_embeddings(photos) for row in chunk.rows]
    assert rows == list(range(9))


def test_norms_are_those_of_the_raw_features(counted: Any, photos: list[Path], tmp_path: Path) -> None:
    pixels = [torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1) for photo in photos]
    with torch.no_grad():
        raw = counted.encode_image(torch.stack([counted.preprocess(one) for one in pixels]), normalize=False)
    expected = raw.norm(dim=1)
    for _ in range(2):  # encoded, then cached
        chunks = list(cached(counted, tmp_path / "cache").iterate_embeddings(photos, batch_size=4))
        torch.testing.assert_close(torch.cat([chunk.norms for chunk in chunks]), expected, atol=1e-5, rtol=1e-5)


def test_broken_images_are_named_each_time_and_do_not_stop_the_others(
    counted: Any, photos: list[Path], tmp_path: Path
) -> None:
    for number in (0, 4, 8):
        photos[number].write_bytes(b"no image")
    for expected in (6, 0):
        counted.num_images = 0
        read = cached(counted, tmp_path / "cache").embed_images_where_readable(photos, batch_size=2)
        assert counted.num_images == expected
        assert read.kept == [1, 2, 3, 5, 6, 7] and [row for row, _ in read.failures] == [0, 4, 8]
        assert len(read.embeddings) == 6
    with pytest.raises(DataError, match=r"Image 0 of 9: .*0\.png"):
        cached(counted, tmp_path / "cache").embed_images(photos)


def test_a_changed_file_is_encoded_again(counted: Any, photos: list[Path], tmp_path: Path) -> None:
    source = cached(counted, tmp_path / "cache")
    before = source.embed_images(photos)
    Image.open(photos[0]).rotate(90).save(photos[3])
    os.utime(photos[5], ns=(1, 1))  # another time alone may mean another content
    counted.num_images = 0
    after = source.embed_images(photos)
    assert counted.num_images == 2
    assert not after[3].equal(before[3])
    torch.testing.assert_close(after[5], before[5], atol=1e-6, rtol=0)


def test_images_of_any_origin(counted: Any, photos: list[Path], tmp_path: Path) -> None:
    content = [photo.read_bytes() for photo in photos]
    (tmp_path / "all.bin").write_bytes(b"".join(content))
    starts = np.cumsum([0, *map(len, content)])
    members = [
        Record(f"{row}", ImageRef(path=str(tmp_path / "all.bin"), offset=int(starts[row]), size=len(content[row])))
        for row in range(9)
    ]
    in_memory = [Record(f"{row}", ImageRef(data=content[row])) for row in range(9)]
    expected = Embedder(counted, "small").embed_images(photos)
    for images in (members, in_memory):
        counted.num_images = 0
        for _ in range(2):
            found = cached(counted, tmp_path / "cache").embed_images(images)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert counted.num_images == 9
    opened = [Image.open(photo) for photo in photos]  # nothing tells these from others but their pixels
    counted.num_images = 0
    torch.testing.assert_close(cached(counted, tmp_path / "cache").embed_images(opened), expected, atol=1e-6, rtol=0)
    assert counted.num_images == 9


def test_what_was_interrupted_continues(counted: Any, photos: list[Path], tmp_path: Path) -> None:
    for chunk in cached(counted, tmp_path / "cache").iterate_embeddings(photos, batch_size=2):
        if 4 in chunk.rows:
            break
    encoded = counted.num_images
    assert 5 <= encoded < 9
    cached(counted, tmp_path / "cache").embed_images(photos)
    assert counted.num_images == 9


def test_texts_are_encoded_once(counted: Any, tmp_path: Path) -> None:
    texts = ["a dog", "a cat", "a dog", "", "word " * 40]
    expected = Embedder(counted, "small").embed_texts(texts)
    counted.num_texts = 0
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        found = cached(counted, tmp_path / "cache").embed_texts(texts, progress=lambda *done: seen.append(done))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert counted.num_texts == 4 and seen == [(0, 4), (4, 4), (4, 4)]
    cached(counted, tmp_path / "cache").embed_texts(["a cat", "a horse"])
    assert counted.num_texts == 5
    with pytest.raises(DataError, match="one string"):
        cached(counted, tmp_path / "cache").embed_texts("a dog")


def test_nothing_to_embed(counted: Any, tmp_path: Path) -> None:
    source = cached(counted, tmp_path / "cache")
    assert source.embed_images([]).shape == (0, 16) and source.embed_texts([]).shape == (0, 16)


def test_models_do_not_share_features(counted: Any, photos: list[Path], tmp_path: Path, small: dict[str, Any]) -> None:
    first = cached(counted, tmp_path / "cache").embed_images(photos)
    torch.manual_seed(1)
    other = CachedEmbedder(lambda: Embedder(build_encoder(small).eval(), "small"), FeatureCache(tmp_path / "cache"))
    assert not other.embed_images(photos).equal(first)


def test_a_named_model_is_not_loaded_when_all_is_known(
    counted: Any, photos: list[Path], tmp_path: Path, small: dict[str, Any]
) -> None:
    folder = save_encoder(counted, tmp_path / "model")
    cache = FeatureCache(tmp_path / "cache")
    first = open_source(f"local-dir:{folder}", "cpu", cache)
    features, texts = first.embed_images(photos), first.embed_texts(["a dog"])
    assert first.card.identity == Embedder(counted, "").identity
    second = open_source(f"local-dir:{folder}", "cpu", cache)
    assert second.embed_images(photos).equal(features) and second.embed_texts(["a dog"]).equal(texts)
    assert "embedder" not in vars(second)  # the model was never asked for
    assert second.card == first.card and second.card.logit_scale == pytest.approx(1 / 0.07)

    torch.manual_seed(2)
    save_encoder(build_encoder(small), folder)  # other weights under the same name
    third = open_source(f"local-dir:{folder}", "cpu", cache)
    assert third.card.identity != first.card.identity
    assert not third.embed_images(photos).equal(features)


def test_bad_names_and_devices_are_errors_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lacks its kind"):
        open_source("ViT-B-32", "cpu", FeatureCache(tmp_path))
    with pytest.raises(ModelError, match="Unknown device"):
        open_source("run:nothing", "cpx", FeatureCache(tmp_path))


def test_info_and_clear(counted: Any, photos: list[Path], tmp_path: Path, small: dict[str, Any]) -> None:
    cache = FeatureCache(tmp_path / "cache")
    assert cache.entries() == [] and cache.clear() == 0
    source = CachedEmbedder(lambda: Embedder(counted, "small"), cache)
    source.embed_images(photos)
    source.embed_texts(["a dog"])
    entries = cache.entries()
    assert [(e.model, e.kind, e.num_items) for e in entries] == [("small", "images", 9), ("small", "texts", 1)]
    assert [e.decoder for e in entries] == ["vlkit 1, fast, EXIF applied", ""]
    with pytest.raises(DataError, match="It holds: small"):
        cache.clear("smal")
    assert cache.clear("small") == sum(entry.num_bytes for entry in entries)
    counted.num_images = 0
    source.embed_images(photos)
    assert counted.num_images == 9
