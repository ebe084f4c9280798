"""Choice of captions, their hashes, and tokenizers that are plain functions."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from vlkit.data.captions import FunctionTokenizer, Tokenizer, caption_hash, choose_captions, drop_tokens
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer


def test_all_captions_are_taken_when_there_are_no_more() -> None:
    assert choose_captions(0, 1, seed=0, epoch=0, sample_id=0) == []
    assert choose_captions(1, 1, seed=0, epoch=0, sample_id=0) == [0]
    assert choose_captions(3, 5, seed=0, epoch=0, sample_id=0) == [0, 1, 2]


def test_choice_is_without_replacement_and_uniform() -> None:
    counts: Counter[int] = Counter()
    for sample_id in range(3000):
        chosen = choose_captions(5, 2, seed=0, epoch=0, sample_id=sample_id)
        assert len(set(chosen)) == 2
        counts.update(chosen)
    assert set(counts) == set(range(5))
    assert all(abs(count / 3000 - 0.4) < 0.04 for count in counts.values())


def test_choice_is_frozen_and_changes_with_the_epoch() -> None:
    assert [choose_captions(5, 1, seed=0, epoch=epoch, sample_id=9)[0] for epoch in range(10)] == [
        1,
        3,
        0,
        3,
        4,
        0,
        3,
        0,
        2,
        2,
    ]


def test_caption_hash_is_frozen() -> None:
    """BLAKE2b of the UTF-8 bytes with 8 bytes of digest, little endian, signed."""
    assert caption_hash("a") == 3405396810240292928
    assert caption_hash("a dog") == caption_hash("a " + "dog") != caption_hash("a Dog")
    assert caption_hash("\ud800") != caption_hash("")  # half a surrogate pair, as broken tables have it
    assert all(-(2**63) <= caption_hash(text) < 2**63 for text in ("", "ü", "猫"))


def words(texts: list[str]) -> Tensor:
    """Start 1, one id a word, end 9, padded with 0 to 6 tokens."""
    tokens = torch.zeros(len(texts), 6, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = [1, *[len(word) + 1 for word in text.split()][:4], 9]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def test_a_plain_function_as_tokenizer() -> None:
    tokenizer = FunctionTokenizer(words)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.context_length == 6
    assert tokenizer.encode_ragged(["", "a bb", "a b c d e f g"]) == [[1, 9], [1, 2, 3, 9], [1, 2, 2, 2, 2, 9]]
    assert tokenizer.pad([[1, 9], [1, 2, 3, 9]]).tolist() == [[1, 9, 0, 0], [1, 2, 3, 9]]
    assert tokenizer.pad([[1, 2, 3, 4, 5, 6, 7, 9]]).tolist() == [[1, 2, 3, 4, 5, 9]]  # stored uncut: keeps its end
    assert FunctionTokenizer(words, full_context=True).pad([[1, 9]]).tolist() == [[1, 9, 0, 0, 0, 0]]


@pytest.mark.parametrize("texts", [["a dog"], ["a dog on the grass", "", "zwölf Boxkämpfer jagen 1234567 Katzen!"]])
def test_function_tokenizer_agrees_with_the_text_tokenizer(texts: list[str]) -> None:
    ours = TextTokenizer(CLIP_BPE, 77)
    padded = TextTokenizer(CLIP_BPE, 77, full_context=True)
    function = FunctionTokenizer(padded, CLIP_BPE)
    assert isinstance(ours, Tokenizer)
    assert function.encode_ragged(texts) == ours.encode_ragged(texts)
    assert torch.equal(function.pad(function.encode_ragged(texts)), ours(texts))


def test_dropped_tokens_leave_start_end_and_order() -> None:
    tokens = [49406, *range(10, 30), 49407]
    kept = drop_tokens(tokens, 0.5, np.random.default_rng(0))
    draws = np.random.default_rng(0).random(20)
    assert kept == [49406, *(token for token, draw in zip(range(10, 30), draws, strict=True) if draw >= 0.5), 49407]


def test_a_text_never_loses_all_its_tokens() -> None:
    random = np.random.default_rng(0)
    assert all(len(drop_tokens([1, 5, 6, 2], 0.99, random)) >= 3 for _ in range(100))
    assert drop_tokens([1, 2], 0.99, random) == [1, 2]
