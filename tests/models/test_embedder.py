"""Images and texts to vectors, against the encoder called by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError
from vlkit.models.embedder import Embedder
from vlkit.models.load import load_embedder
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(build_encoder(SMALL).eval(), "small")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    for number in range(5):
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.iterdir())


def by_hand(embedder: Embedder, photo: Path) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)
    with torch.no_grad():
        return embedder.encoder.encode_image(embedder.encoder.preprocess(pixels)[None])[0]


@pytest.mark.parametrize("workers", [0, 2, None])
def test_images_come_in_order_from_paths_records_and_pillow(
    workers: int | None, embedder: Embedder, photos: list[Path]
) -> None:
    expected = torch.stack([by_hand(embedder, photo) for photo in photos])
    forms = [
        photos,
        [str(photo) for photo in photos],
        [Image.open(photo) for photo in photos],
        [Record(photo.name, ImageRef(data=photo.read_bytes())) for photo in photos],
    ]
    seen: list[tuple[int, int]] = []
    for images in forms:
        seen.clear()
        embeddings = embedder.embed_images(
            images, batch_size=2, workers=workers, progress=lambda done, total: seen.append((done, total))
        )
        torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)
        assert seen == [(2, 5), (4, 5), (5, 5)]
    assert embeddings.dtype == torch.float32 and embeddings.device.type == "cpu"
    assert not embeddings.is_inference()  # adapters will train on them


def test_an_unreadable_image_stops_and_is_named(embedder: Embedder, photos: list[Path]) -> None:
    photos[3].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Image 3 of 5: .*3\.png"):
        embedder.embed_images(photos, batch_size=2)
    with pytest.raises(DataError, match=r"missing\.png"):
        embedder.embed_images([photos[0], photos[0].with_name("missing.png")])


def test_or_is_left_out_and_named(embedder: Embedder, photos: list[Path]) -> None:
    for number in (0, 1, 3):  # a whole batch, and part of one
        photos[number].write_bytes(b"no image")
    embeddings, kept, failures = embedder.embed_images_where_readable(photos, batch_size=2)
    assert kept == [2, 4] and [row for row, _ in failures] == [0, 1, 3]
    assert "1.png" in failures[1][1]
    torch.testing.assert_close(embeddings, embedder.embed_images([photos[2], photos[4]]), atol=1e-6, rtol=0)


def test_texts_come_in_order_and_equal_ones_are_embedded_once(embedder: Embedder) -> None:
    texts = ["a small dog", "a cat", "a small dog", "", "word " * 40, "a cat"]
    seen: list[tuple[int, int]] = []
    embeddings = embedder.embed_texts(texts, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (4, 4)]
    with torch.no_grad():
        expected = torch.cat([embedder.encoder.encode_text(embedder.encoder.tokenize([text])) for text in texts])
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)
    assert embeddings[0].equal(embeddings[2]) and not embeddings.is_inference()
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))


def test_nothing_to_embed(embedder: Embedder) -> None:
    assert embedder.embed_texts([]).shape == (0, 16)
    assert embedder.embed_images([]).shape == (0, 16)
    assert embedder.embed_images_where_readable([]).kept == []


def test_a_single_string_is_no_list(embedder: Embedder) -> None:
    with pytest.raises(DataError, match="one string 'a dog'"):
        embedder.embed_texts("a dog")
    with pytest.raises(DataError, match=r"one path a\.png"):
        embedder.embed_images("a.png")
    with pytest.raises(DataError, match="Text 1 is a int"):
        embedder.embed_texts(["a", 3])  # type: ignore[list-item]


def test_identity_is_that_of_weights_preprocessing_and_tokenizer(embedder: Embedder, tmp_path: Path) -> None:
    save_encoder(embedder.encoder, tmp_path / "a")
    save_encoder(embedder.encoder, tmp_path / "b")
    first, second = (load_embedder(f"local-dir:{tmp_path / name}", device="cpu") for name in "ab")
    assert first.name != second.name
    assert first.identity == second.identity == embedder.identity
    torch.manual_seed(0)
    changed = {
        "weights": build_encoder(SMALL),
        "preprocessing": build_encoder(SMALL, preprocess={"resize_mode": "squash"}),
        "tokenizer": build_encoder(
            {**SMALL, "text_cfg": {**SMALL["text_cfg"], "tokenizer_kwargs": {"clean": "whitespace"}}}
        ),
    }
    for name, encoder in changed.items():
        if name == "weights":
            encoder.log_scale.data.add_(1e-6)
        else:
            encoder.model.load_state_dict(embedder.encoder.weights())
        assert Embedder(encoder, name).identity != embedder.identity, name


def test_scale_and_family(embedder: Embedder) -> None:
    assert embedder.logit_scale == pytest.approx(1 / 0.07) and embedder.logit_bias is None
    assert embedder.family == "softmax"
    sigmoid = Embedder(build_encoder(SMALL, init_logit_bias=-10), "sigmoid")
    assert sigmoid.family == "sigmoid" and sigmoid.logit_bias == -10
