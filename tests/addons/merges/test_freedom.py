from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.merges.freedom import FreeDom
from vlkit.addons.reference import Captions, Reference
from vlkit.errors import ConfigError, DataError

WORDS = ["dog", "cat", "car", "tree", "boat", "lamp", "fish", "shoe"]


@pytest.fixture
def fitted(tiny_source: Any, tmp_path: Path) -> FreeDom:
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    addon = FreeDom(words=str(tmp_path / "words.txt"), num_proxies=4, words_each=3, num_words=2)
    return addon.fit(Reference(task="retrieval"), tiny_source())


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_words_against_a_loop_from_the_paper(fitted: FreeDom) -> None:
    assert fitted.vectors is not None
    images, gallery = unit(3, 0), unit(12, 1)
    gallery[5] = images[1]  # in the gallery itself, so it is its own first proxy
    found = fitted.inverted(images, gallery)
    for row, image in enumerate(images):
        order = sorted(range(12), key=lambda item: -float(gallery[item] @ image))
        proxies = [gallery[item] for item in order[:4]] if row == 1 else [image] + [gallery[i] for i in order[:3]]
        counts: Counter[str] = Counter()
        for proxy in proxies:
            near = sorted(range(len(WORDS)), key=lambda word: -float(fitted.vectors[word] @ proxy))  # type: ignore[index]
            counts.update(WORDS[word] for word in near[:3])
        most = max(counts.values())
        for word, weight in zip(found.words[row], found.weights[row].tolist(), strict=True):
            assert weight == pytest.approx(counts[word] / most)
        best = sorted((count / most for count in counts.values()), reverse=True)[:2]
        assert found.weights[row].tolist() == pytest.approx(best)


def test_scores_are_the_weighted_sum_over_words(fitted: FreeDom, tiny_source: Any) -> None:
    images, gallery, source = unit(3, 2), unit(12, 3), tiny_source()
    found = fitted.inverted(images, gallery)
    prompts = found.prompts(["sketch", "toy", "origami"])
    assert prompts[0][1] == f"{found.words[1][0]} toy" and len(prompts) == 2
    merged = fitted.for_weights(found.weights).merge([source.embed_texts(column) @ gallery.T for column in prompts])
    for row, text in enumerate(["sketch", "toy", "origami"]):
        query = sum(
            weight * source.embed_texts([f"{word} {text}"])[0]
            for word, weight in zip(found.words[row], found.weights[row].tolist(), strict=True)
        )
        assert torch.allclose(merged[row], gallery @ query, atol=1e-5)


def test_neighbours_correct_a_query_image_that_is_off(fitted: FreeDom, tiny_source: Any) -> None:
    # The image lies a little nearer to "cat"; its neighbours are dogs.
    dog, cat = tiny_source().embed_texts(["dog", "cat"])
    image = F.normalize(dog + 1.2 * cat, dim=0)[None]
    gallery = F.normalize(dog + 0.4 * cat + 0.05 * unit(12, 4), dim=-1)
    alone = FreeDom(
        num_proxies=1, words_each=1, num_words=1, vocabulary=fitted.vocabulary, vectors=fitted.vectors
    ).inverted(image, gallery)
    helped = FreeDom(
        num_proxies=8, words_each=1, num_words=1, vocabulary=fitted.vocabulary, vectors=fitted.vectors
    ).inverted(image, gallery)
    assert alone.words == [("cat",)] and helped.words == [("dog",)]


def test_words_of_captions_and_what_cannot_be(tiny_source: Any, fitted: FreeDom, tmp_path: Path) -> None:
    source = tiny_source()
    texts = ("a dog on a sofa .", "two dogs in the snow .", "a brown cat sits .", "the cat and a dog", "the sofa .")
    captions = Captions(texts, Vectors("text", source.embed_texts(texts)), "train")
    learned = FreeDom(words_each=2, num_words=2).fit(Reference(task="retrieval", captions=captions), source)
    assert learned.vocabulary == ["dog", "cat", "sofa"]  # "snow" stands once only
    with pytest.raises(ConfigError, match="freedom needs words"):
        FreeDom().fit(Reference(task="retrieval"), source)
    with pytest.raises(DataError, match="found 3 words; expected at least 7"):
        FreeDom().fit(Reference(task="retrieval", captions=captions), source)
    with pytest.raises(DataError, match="Cannot read the words"):
        FreeDom(words=str(tmp_path / "none.txt")).fit(Reference(task="retrieval"), source)
    with pytest.raises(ConfigError, match="composed-retrieval"):
        fitted.merge([unit(2, 0), unit(2, 1)])
    again = FreeDom.from_state(learned.state())
    assert again.key == learned.key
