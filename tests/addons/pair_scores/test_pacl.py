from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.base import Vectors
from vlkit.addons.pair_scores.pacl import Pacl
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.addons.saved import load_addon, save_addon
from vlkit.errors import CheckpointError, ConfigError, ModelError
from vlkit.models.heads.patch_alignment import HEAD_FILE, PatchAlignment, save_head

WIDTH, DIM = 24, 16


def saved(folder: Path, source: Any) -> PatchAlignment:
    torch.manual_seed(0)
    head = PatchAlignment(WIDTH, DIM, 4.0)
    save_head(head, folder / HEAD_FILE, source.card.weights)
    return head


def pictures(count: int, seed: int = 1) -> Vectors:
    random = torch.Generator().manual_seed(seed)
    pooled = F.normalize(torch.randn(count, DIM, generator=random), dim=-1)
    return Vectors("image", pooled, patch_tokens=torch.randn(count, 6, WIDTH, generator=random), grid=(2, 3))


def test_each_pair_with_its_own_attention(tiny_source: Any, tmp_path: Path) -> None:
    source = tiny_source()
    head, images = saved(tmp_path, source), pictures(3)
    texts = Vectors("text", source.embed_texts(["a cat", "two dogs"]))
    fitted = Pacl(head=str(tmp_path)).fit(Reference(task="retrieval"), source)
    found = fitted.score(images, texts)
    assert images.patch_tokens is not None
    for i in range(3):
        local = head(images.patch_tokens[i])
        for j, text in enumerate(texts.pooled):
            attention = (4.0 * F.cosine_similarity(local, text[None], dim=-1)).softmax(0)
            pooled = (attention[:, None] * local).sum(0)
            assert found[i, j].item() == pytest.approx(F.cosine_similarity(pooled, text, dim=0).item(), abs=1e-5)
    torch.testing.assert_close(fitted.score(texts, images), found.T)
    torch.testing.assert_close(fitted.patches(images), fitted.patches_of(images.patch_tokens))
    assert fitted.patches(images.rows([])).shape == (0, 6, DIM)


def test_saved_and_loaded(tiny_source: Any, tmp_path: Path) -> None:
    source = tiny_source()
    saved(tmp_path, source)
    fitted = Pacl(head=str(tmp_path)).fit(Reference(task="retrieval"), source)
    again, texts = load_addon(save_addon(fitted, tmp_path / "addon")), Vectors("text", torch.eye(DIM)[:2])
    assert isinstance(again, Pacl) and torch.equal(again.score(pictures(2), texts), fitted.score(pictures(2), texts))


def scenes(source: Any, first: int, count: int) -> tuple[Vectors, torch.Tensor, torch.Tensor]:
    """Images of six patches, one of which holds what the caption says; captions; the place of that patch."""
    texts = source.embed_texts([f"word{number}" for number in range(first, first + count)])
    mixing = torch.randn(DIM, WIDTH, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(first + 1)
    tokens = torch.randn(count, 6, WIDTH, generator=random)
    place = torch.randint(0, 6, (count,), generator=random)
    tokens[torch.arange(count), place] = texts @ mixing
    return replace(pictures(count), patch_tokens=tokens), texts, place


def test_training_finds_the_patch_that_the_caption_is_about(tiny_source: Any) -> None:
    """On captions that were not trained on; without attention the other five patches drown it."""
    source = tiny_source()
    vectors, texts, _ = scenes(source, 0, 1000)
    words = tuple(f"word{number}" for number in range(1000))
    captions = Captions(words, Vectors("text", texts), "train", image_row=torch.arange(1000))
    reference = Reference(task="retrieval", images=Part("train", vectors), captions=captions)
    fitted = Pacl(epochs=10, lr=5e-3, batch_size=100).fit(reference, source)
    held_out, texts, place = scenes(source, 5000, 50)
    aligned = F.normalize(fitted.patches(held_out), dim=-1)
    assert ((aligned * texts[:, None]).sum(-1).argmax(1) == place).float().mean() > 0.8
    right = torch.arange(50)
    recalled = (fitted.score(held_out, Vectors("text", texts)).argmax(1) == right).float().mean()
    by_mean = ((fitted.patches(held_out).mean(1) @ texts.T).argmax(1) == right).float().mean()
    assert recalled > by_mean + 0.1


def test_bad_input(tiny_source: Any, tmp_path: Path) -> None:
    source = tiny_source()
    saved(tmp_path, source)
    with pytest.raises(ConfigError, match="trained on another encoder than other"):
        Pacl(head=str(tmp_path)).fit(Reference(task="retrieval"), tiny_source(name="other"))
    with pytest.raises(CheckpointError, match="no patch alignment head"):
        Pacl(head=str(tmp_path / "nowhere")).fit(Reference(task="retrieval"), source)
    with pytest.raises(ConfigError, match="or images with their captions"):
        Pacl().fit(Reference(task="retrieval"), source)
    fitted = Pacl(head=str(tmp_path)).fit(Reference(task="retrieval"), source)
    with pytest.raises(ModelError, match="have none"):
        fitted.score(replace(pictures(2), patch_tokens=None), Vectors("text", torch.eye(DIM)[:2]))
