from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.waffle import WORDS, Waffle, draw_junk
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

CLASSES = tuple(parse_class(name) for name in ("polar bear", "sea lion", "hen"))


def fitted(source: Any, seed: int = 0, **settings: Any) -> Waffle:
    addon = Pipeline([Waffle(**settings)]).fit(Reference(class_names=CLASSES, seed=seed), source).addons[0]
    assert isinstance(addon, Waffle)
    return addon


def test_a_class_scores_the_mean_over_the_same_junk(tiny_source: Any) -> None:
    source = tiny_source()
    addon = fitted(source, pairs=3)
    assert addon.junk is not None and len(addon.junk) == 6
    image = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores = addon.weights(CLASSES, source).scores(image)[0]
    for place, item in enumerate(CLASSES):
        prompts = [f"A photo of a {item.shown}, which has {junk}." for junk in addon.junk]
        slow = sum(float(image[0] @ source.embed_texts([prompt])[0]) for prompt in prompts) / 6
        assert abs(float(scores[place]) - slow) < 1e-5


def test_junk_is_words_and_characters_as_long_as_the_names() -> None:
    junk = draw_junk([item.shown for item in CLASSES], 4, WORDS, seed=0)
    # 5 words in 3 names: 2 a text; 19 letters: 4 a word; the longest words have 5, 4 and 3 letters: 4 in 2 groups.
    assert all(len(text.split()) == 2 for text in junk)
    assert all(word in {one[:4] for one in WORDS} for text in junk[::2] for word in text.split())
    assert all(
        [len(group) for group in text.split(", ")] == [2, 2] and text.replace(", ", "").isalpha() for text in junk[1::2]
    )
    assert len(set(junk)) == 8


def test_without_junk_it_is_the_bare_prompt_and_the_seed_counts(tiny_source: Any) -> None:
    source = tiny_source()
    bare = fitted(source, pairs=0).weights(CLASSES, source)
    assert torch.equal(bare.vectors, source.embed_texts([f"A photo of a {item.shown}." for item in CLASSES]))
    first, again, other = fitted(source), fitted(source), fitted(source, seed=1)
    assert first.junk == again.junk != other.junk
    images = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert not torch.allclose(first.weights(CLASSES, source).scores(images), bare.scores(images), atol=1e-2)


def test_a_concept_and_words_of_ones_own(tiny_source: Any, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("zebra\n")
    addon = fitted(tiny_source(), pairs=1, concept="animal", words=str(words))
    assert addon.prompts(CLASSES)[0][0] == "A photo of a animal: a polar bear, which has zebr zebr."
    words.write_text("\n")
    with pytest.raises(ConfigError, match="There is no word in"):
        fitted(tiny_source(), words=str(words))
    with pytest.raises(ConfigError, match="cannot read the words"):
        fitted(tiny_source(), words=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="pairs = -1"):
        fitted(tiny_source(), pairs=-1)
